"""What clients have captured and not yet released: held captures by id, leases by token, each its client's."""

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from steer_service.core.capture import chosen_layers
from steer_service.core.events import CaptureBlock, CaptureHeld
from steer_service.core.positions import Spans
from steer_service.core.stored_capture import in_order, unknown_capture
from steer_service.runtime.local_capture import LocalCapture


@dataclass(slots=True, kw_only=True, eq=False)
class StoredCapture:
    """One output's captures in the store."""

    key: str
    """What fetches or releases it: unguessable."""
    client_id: str
    """The client it belongs to; nobody else learns that it exists."""
    held: LocalCapture
    """The rows."""
    output_index: int
    """Which output of its request they are of."""
    session: bytes = b""
    """The shared-memory session whose end ends it; b"" for captures that are held."""
    release_token: bytes = b""
    """What frees all that its request left; b"" for nothing."""
    used_at: float = 0.0
    """When it was used last, on the event loop's clock, in seconds."""
    expires_at: float = 0.0
    """When it ends unless it is used, in seconds since 1970."""
    readers: "dict[asyncio.Task[object], Callable[[], object]]" = field(default_factory=dict)
    """Tasks that send it right now, and what stops each: its memory stays until they end."""
    is_gone: bool = False
    """It was released or has expired."""
    timer: asyncio.TimerHandle | None = None
    """Ends it, or waits on if it was used meanwhile; there is one at a time."""

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
    for layer in chosen_layers(stored.held.metadata.layers, layers):
        captured = stored.held.captured.select((layer,), spans)
        for _, site, hidden in in_order(captured):
            yield CaptureBlock(
                output_index=stored.output_index, layer=layer, site=site, spans=captured.spans, hidden=hidden
            )


class CaptureStore:
    """Keeps captures until they are released, have expired, or the session that they were leased to ends.

    Belongs to one event loop. `count` is called with what happened to how many bytes: "released" or "expired".
    `keeps_read`: what is being read does not expire, for somebody else ends readers that take nothing.
    """

    def __init__(self, ttl_s: float, count: Callable[[str, int], None], *, keeps_read: bool = False) -> None:
        self._ttl_s = ttl_s
        self._count = count
        self._keeps_read = keeps_read
        self._captures: dict[str, StoredCapture] = {}

    def __len__(self) -> int:
        return len(self._captures)

    @property
    def total_bytes(self) -> int:
        """Bytes of all rows in the store."""
        return sum(capture.held.metadata.total_bytes for capture in self._captures.values())

    def put(
        self, event: CaptureHeld, client_id: str, session: bytes = b"", release_token: bytes = b""
    ) -> StoredCapture:
        """Takes over what `event` holds; with a `session` it is leased to that."""
        capture = StoredCapture(
            key=secrets.token_urlsafe(32),
            client_id=client_id,
            held=_local(event),
            output_index=event.output_index,
            session=session,
            release_token=release_token,
        )
        self._captures[capture.key] = capture
        self.renew(capture)
        self._wait_on(capture)
        return capture

    @contextmanager
    def reading(self, key: str, client_id: str, stop: Callable[[], object] | None = None) -> Iterator[StoredCapture]:
        """The capture, whose memory stays for the duration of the block; raises NotFound.

        If it expires meanwhile, `stop` is called and ends the block soon. Default: its task is cancelled. A lease is
        not read: whoever has it could shorten its segment, and reading on would kill this process.
        """
        capture = self._find(key, client_id)
        if capture is None or capture.session:
            raise unknown_capture()
        task = asyncio.current_task()
        assert task is not None
        capture.readers[task] = stop or task.cancel
        self.renew(capture)
        try:
            yield capture
        finally:
            del capture.readers[task]
            self.renew(capture)
            if capture.is_gone:
                self._free(capture)

    def renew(self, capture: StoredCapture) -> None:
        """Puts its end off: it is being used."""
        capture.used_at = asyncio.get_running_loop().time()
        capture.expires_at = time.time() + self._ttl_s

    def release(self, key: str, client_id: str) -> None:
        """Ends a capture or a lease; does nothing if there is none, or it is another client's."""
        capture = self._find(key, client_id)
        if capture is not None:
            self._end(capture, "released")

    def release_all(self, release_token: bytes, client_id: str) -> None:
        """Ends all that one request of this client left."""
        left = [
            one for one in self._captures.values() if (one.release_token, one.client_id) == (release_token, client_id)
        ]
        for capture in left:
            self._end(capture, "released")

    def end_session(self, session: bytes) -> None:
        """Ends all leases of a shared-memory session."""
        for capture in [one for one in self._captures.values() if one.session == session]:
            self._end(capture, "released")

    def close(self) -> None:
        """Ends everything."""
        for capture in list(self._captures.values()):
            self._end(capture, "released")

    def _find(self, key: str, client_id: str) -> StoredCapture | None:
        capture = self._captures.get(key)
        return capture if capture is not None and capture.client_id == client_id else None

    def _wait_on(self, capture: StoredCapture) -> None:
        """Ends it when it has not been used for `ttl_s`. Its uses, which may be many a second, set no timers."""
        ends_at = capture.used_at + self._ttl_s
        capture.timer = asyncio.get_running_loop().call_at(ends_at, self._end_unless_used, capture, capture.used_at)

    def _end_unless_used(self, capture: StoredCapture, since: float) -> None:
        if capture.readers and self._keeps_read:
            self.renew(capture)
        if capture.used_at > since:
            self._wait_on(capture)
        else:
            self._end(capture, "expired")

    def _end(self, capture: StoredCapture, why: str) -> None:
        if capture.is_gone:
            return
        capture.is_gone = True
        del self._captures[capture.key]
        if capture.timer is not None:
            capture.timer.cancel()
        self._count(why, capture.held.metadata.total_bytes)
        if why == "expired":  # whoever was reading has not taken a byte for the whole of that time
            for stop in capture.readers.values():
                stop()
        self._free(capture)

    @staticmethod
    def _free(capture: StoredCapture) -> None:
        if not capture.readers:
            capture.held.release_nowait()


def _local(event: CaptureHeld) -> LocalCapture:
    assert isinstance(event.held, LocalCapture), "a server's backend captures into this process's memory"
    return event.held
