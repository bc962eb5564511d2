"""Every error that a caller can receive, from any backend.

SteerError
├── InvalidRequest       (also a ValueError)    the request itself is wrong: a field and the rule it broke
├── NotFound             (also a LookupError)   an unknown model, program or capture
│   ├── MissingVectors   vectors that are named but not stored, with their digests
│   └── OtherInstance    something that is on another server behind the same balancer, with its name
├── Unsupported          (also NotImplementedError)  valid, but not implemented or switched off here
├── Overloaded           a budget is spent: try again after `retry_after_s`
│   └── OverBudget       too many bytes: has the bytes asked for and the bytes allowed
├── DeadlineExceeded     (also a TimeoutError)  the caller's deadline passed
├── Unauthenticated      (also a PermissionError)  the server does not know who calls
├── PermissionDenied     (also a PermissionError)  it knows, and does not allow it
└── EngineFailed         (also a RuntimeError)  the engine or the connection to it failed
"""

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

Key = TypeVar("Key")
Item = TypeVar("Item")


class SteerError(Exception):
    """The base of every error that this project raises for its callers."""

    default_reason = "UNSPECIFIED"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        field: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        """What went wrong, for people; from a server it never names a path, a segment or a prompt."""
        self.reason = reason or self.default_reason
        """What went wrong, for programs: UPPER_SNAKE, stable between releases."""
        self.field = field
        """Path of the offending request field, such as `steering.layers[5].operations[0].vector`; "" if none."""
        self.retry_after_s = retry_after_s
        """Seconds after which the same request may succeed; None if waiting does not help."""
        self.x_request_id = ""
        """The id of the failed call in the logs of the server; "" without a server."""
        self.prompt_index: int | None = None
        """Number of the prompt, from 0, in a call with a list of them; None if no single prompt failed."""
        self.is_place_in_message = False
        """True if the message says where the fault is in its own words, so that `str` leaves the field out."""

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field and not self.is_place_in_message else self.message


class InvalidRequest(SteerError, ValueError):
    """The request breaks a rule; sending it again unchanged fails again."""

    default_reason = "INVALID_REQUEST"


class NotFound(SteerError, LookupError):
    """The request names something that does not exist here."""

    default_reason = "NOT_FOUND"


class MissingVectors(NotFound):
    """The request names vectors that the server does not store; send the request again with the vectors themselves."""

    default_reason = "UNKNOWN_VECTOR"

    def __init__(
        self,
        message: str,
        *,
        digests: tuple[bytes, ...] = (),
        count: int = 0,
        instance: str = "",
        reason: str | None = None,
        field: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, reason=reason, field=field, retry_after_s=retry_after_s)
        self.digests = digests
        """Their digests, 32 bytes each, in the order of the request; through a server only the first 128 of them."""
        self.count = max(count, len(digests))
        """The number of missing vectors."""
        self.instance = instance
        """Name of the server that lacks them, of those behind a balancer; "" if it did not say."""


class OtherInstance(NotFound):
    """The request names something that is on another server behind the same balancer; send it there."""

    default_reason = "OTHER_INSTANCE"

    def __init__(
        self,
        message: str,
        *,
        instance: str = "",
        reason: str | None = None,
        field: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, reason=reason, field=field, retry_after_s=retry_after_s)
        self.instance = instance
        """Name of the server that has it."""


class Unsupported(SteerError, NotImplementedError):
    """The request asks for something this server does not do, or has switched off."""

    default_reason = "UNSUPPORTED"


class Overloaded(SteerError):
    """A budget is exhausted; the message names the budget and the excess."""

    default_reason = "OVERLOADED"


class OverBudget(Overloaded):
    """The request needs more bytes than are allowed; waiting helps only if `retry_after_s` is set."""

    default_reason = "OVER_BUDGET"

    def __init__(
        self,
        message: str,
        *,
        asked_bytes: int = 0,
        allowed_bytes: int = 0,
        reason: str | None = None,
        field: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, reason=reason, field=field, retry_after_s=retry_after_s)
        self.asked_bytes = asked_bytes
        """Bytes that the request needs."""
        self.allowed_bytes = allowed_bytes
        """Bytes that it may have."""


class DeadlineExceeded(SteerError, TimeoutError):
    """The caller's deadline passed before the request finished."""

    default_reason = "DEADLINE_EXCEEDED"


class Unauthenticated(SteerError, PermissionError):
    """The call has no valid credentials. Neither the message nor the reason says what is wrong with them."""

    default_reason = "UNAUTHENTICATED"


class PermissionDenied(SteerError, PermissionError):
    """The server knows the client, and does not allow it this."""

    default_reason = "PERMISSION_DENIED"


class EngineFailed(SteerError, RuntimeError):
    """The engine or the connection to it failed; the result of the request is lost."""

    default_reason = "ENGINE_FAILED"


def closed_error(what: str) -> EngineFailed:
    """The error of every call of `what`, such as "the client", after it was closed."""
    return EngineFailed(f"{what} is closed and cannot be used again", reason="CLOSED")


class within:
    """Prefixes the field of any SteerError raised inside with `path`."""

    __slots__ = ("_path",)

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        _prefix(error, self._path)


class within_each(Generic[Key, Item]):
    """Prefixes the field of any SteerError raised inside with `path[key]`, of the pair yielded last.

    `with within_each("operations", enumerate(operations)) as items:` and in it `for index, operation in items:`. It is
    for programs, where a `within` around every operation would be measurably slower.
    """

    __slots__ = ("_key", "_pairs", "_path")

    def __init__(self, path: str, pairs: Iterable[tuple[Key, Item]]) -> None:
        self._path = path
        self._pairs = pairs

    def __enter__(self) -> Iterator[tuple[Key, Item]]:
        return self._taken()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            _prefix(error, f"{self._path}[{self._key}]")

    def _taken(self) -> Iterator[tuple[Key, Item]]:
        for pair in self._pairs:
            self._key = pair[0]
            yield pair


def _prefix(error: BaseException | None, path: str) -> None:
    if isinstance(error, SteerError):
        error.field = f"{path}.{error.field}" if error.field else path
