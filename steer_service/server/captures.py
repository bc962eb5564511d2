"""What clients have captured and not yet released: held captures by id, leases by token, each its owner's."""

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from steer_service.core.held import LocalCapture, in_order, unknown_capture
from steer_service.core.positions import Spans
from steer_service.core.request import CaptureBlock, CaptureHeld


@dataclass(slots=True, kw_only=True, eq=False)
class StoredCapture:
    """One output's captures in the store."""

    key: str
    """What fetches or releases it: unguessable."""
    owner: str
    """The client it belongs to; nobody else learns that it exists."""
    held: LocalCapture
    """The rows."""
    output_index: int
    """Which output of its request they are of."""
    session: bytes = b""
    """The shared-memory session whose end ends it; b"" for captures that are held."""
    expires_at: float = 0.0
    """When it ends unless it is used, in seconds since 1970."""
    readers: "set[asyncio.Task[object]]" = field(default_factory=set)
    """Tasks that send it right now: its memory stays until they end."""
    is_gone: bool = False
    """It was released or has expired."""
    timer: asyncio.TimerHandle | None = None
    """Ends it."""

    def check_there(self) -> None:
        """Raises NotFound once it was released or has expired: whoever sends it stops."""
        if self.is_gone:
            raise unknown_capture()


def blocks_of(
    stored: StoredCapture, layers: Sequence[int] | None = None, spans: Spans | None = None
) -> Iterator[CaptureBlock]:
    """Stored rows as blocks, layer by layer, so that rows which must be put together are copied for one at a time.

    None means all layers, or all positions. Raises InvalidRequest for what was not captured.
    """
    for chosen in stored.held.facts.layers if layers is None else dict.fromkeys(layers):
        captured = stored.held.captured.select((chosen,), spans)
        for layer, site, hidden in in_order(captured):
            yield CaptureBlock(
                output_index=stored.output_index, layer=layer, site=site, spans=captured.spans, hidden=hidden
            )


class CaptureStore:
    """Keeps captures until they are released, have expired, or the session that they were leased to ends.

    Belongs to one event loop. `count` is called with what happened to how many bytes: "released" or "expired".
    """

    def __init__(self, ttl_s: float, count: Callable[[str, int], None]) -> None:
        self._ttl_s = ttl_s
        self._count = count
        self._captures: dict[str, StoredCapture] = {}

    def __len__(self) -> int:
        return len(self._captures)

    @property
    def total_bytes(self) -> int:
        """Bytes of all rows in the store."""
        return sum(capture.held.facts.total_bytes for capture in self._captures.values())

    def put(self, event: CaptureHeld, owner: str, session: bytes = b"") -> StoredCapture:
        """Takes over what `event` holds; with a `session` it is leased to that."""
        capture = StoredCapture(
            key=secrets.token_urlsafe(32),
            owner=owner,
            held=_local(event),
            output_index=event.output_index,
            session=session,
        )
        self._captures[capture.key] = capture
        self._renew(capture)
        return capture

    @contextmanager
    def reading(self, key: str, owner: str) -> Iterator[StoredCapture]:
        """The capture, whose memory stays for the duration of the block; raises NotFound.

        A lease is none: whoever has it could shorten its segment, and reading on would kill this process.
        """
        capture = self._find(key, owner)
        if capture is None or capture.session:
            raise unknown_capture()
        task = asyncio.current_task()
        assert task is not None
        capture.readers.add(task)
        try:
            yield capture
        finally:
            capture.readers.discard(task)
            if capture.is_gone:
                self._free(capture)
            else:
                self._renew(capture)

    def renew(self, capture: StoredCapture) -> None:
        """Puts its end off: it is being used."""
        if not capture.is_gone:
            self._renew(capture)

    def release(self, key: str, owner: str) -> None:
        """Ends a capture or a lease; does nothing if there is none, or it is another client's."""
        capture = self._find(key, owner)
        if capture is not None:
            self._end(capture, "released")

    def end_session(self, session: bytes) -> None:
        """Ends all leases of a shared-memory session."""
        for capture in [one for one in self._captures.values() if one.session == session]:
            self._end(capture, "released")

    def close(self) -> None:
        """Ends everything."""
        for capture in list(self._captures.values()):
            self._end(capture, "released")

    def _find(self, key: str, owner: str) -> StoredCapture | None:
        capture = self._captures.get(key)
        return capture if capture is not None and capture.owner == owner else None

    def _renew(self, capture: StoredCapture) -> None:
        capture.expires_at = time.time() + self._ttl_s
        if capture.timer is not None:
            capture.timer.cancel()
        capture.timer = asyncio.get_running_loop().call_later(self._ttl_s, self._end, capture, "expired")

    def _end(self, capture: StoredCapture, why: str) -> None:
        if capture.is_gone:
            return
        capture.is_gone = True
        del self._captures[capture.key]
        if capture.timer is not None:
            capture.timer.cancel()
        self._count(why, capture.held.facts.total_bytes)
        if why == "expired":  # whoever was reading has not taken a byte for the whole of that time
            for task in capture.readers:
                task.cancel()
        self._free(capture)

    @staticmethod
    def _free(capture: StoredCapture) -> None:
        if not capture.readers:
            capture.held.abandon()


def _local(event: CaptureHeld) -> LocalCapture:
    assert isinstance(event.held, LocalCapture), "a server's backend captures into this process's memory"
    return event.held
