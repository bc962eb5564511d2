"""What single fields of the contract may hold, and what is said when they hold something else."""

from steer_service.core.errors import InvalidRequest, Unsupported

LARGEST_UINT32 = 2**32 - 1


def not_built(what: str, field: str) -> Unsupported:
    """The error for a part of the contract that this server does not do yet."""
    return Unsupported(f"{what} is not built yet", reason="NOT_BUILT", field=field)


def missing(what: str, field: str) -> InvalidRequest:
    """The error for a field that must be set and is not."""
    return InvalidRequest(f"{what} is not set", reason="MISSING_FIELD", field=field)


def uint32(value: int, what: str, field: str) -> int:
    """`value`, raising InvalidRequest if it does not fit the wire's unsigned 32 bits."""
    if not 0 <= value <= LARGEST_UINT32:
        raise InvalidRequest(f"{what} {value} is outside 0..{LARGEST_UINT32}", reason="OUT_OF_RANGE", field=field)
    return int(value)


def utf8(text: str, field: str) -> str:
    """`text`, raising InvalidRequest if it cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"the text has a lone surrogate at character {error.start}", reason="BAD_TEXT", field=field
        ) from None
    return text
