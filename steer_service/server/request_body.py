"""The bytes of a request, held only until they are read."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from google.protobuf.message import Message

from steer_service.core.errors import SteerError
from steer_service.wire.message_scan import LIMITS, FieldLimits, parsed, scan

M = TypeVar("M", bound=Message)


class RequestBody:
    """What gRPC hands to a method in place of a message.

    An error keeps the frames that it passed through until the garbage collector comes, and with them everything in
    their variables. Bytes that were refused must not stay there: a message may have 16 MiB.
    """

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def read(self, kind: type[M]) -> M:
        """The message, after a scan; raises what `scan` and `parsed` in `wire.message_scan` raise."""
        self.scan(kind)
        return self.parse(kind)

    def scan(self, kind: type[Message], limits: FieldLimits = LIMITS) -> dict[str, int]:
        """What `wire.message_scan.scan` says of the bytes; raises what it raises."""
        with self._let_go_if_refused():
            return scan(kind.DESCRIPTOR, self._data, limits)

    def parse(self, kind: type[M]) -> M:
        """The message, which was scanned; the bytes are not held any longer. Raises InvalidRequest (MALFORMED)."""
        with self._let_go_if_refused():
            message = parsed(kind, self._data)
        self._data = b""
        return message

    @contextmanager
    def _let_go_if_refused(self) -> Iterator[None]:
        try:
            yield
        except SteerError as error:
            self._data = b""
            # Only the frames of the scan and the parser have ended. Those of callers still run and are left alone.
            traceback.clear_frames(error.__traceback__)
            raise
