"""What is said of a field that is not set, or asks for what is not built."""

from steer_service.core.errors import InvalidRequest, Unsupported


def not_built(what: str, field: str = "") -> Unsupported:
    """The error for a part of the contract that this server does not do yet."""
    return Unsupported(f"{what} is not built yet", reason="NOT_BUILT", field=field)


def missing(what: str, field: str = "") -> InvalidRequest:
    """The error for a field that must be set and is not."""
    return InvalidRequest(f"{what} is not set", reason="MISSING_FIELD", field=field)
