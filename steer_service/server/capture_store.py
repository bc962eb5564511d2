"""Captures that are kept until their client releases them: held captures by id, leases of shared memory by token."""

import asyncio
import hmac
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from steer_service.core.capture import CapturedRows, chosen_layers
from steer_service.core.events import CaptureBlock, CaptureHeld
from steer_service.core.spans import Spans
from steer_service.core.stored_capture import in_order, unknown_capture
from steer_service.runtime.local_capture import LocalCapture
from steer_service.server.instance import Instance

HANDOVER_S = 3.0
"""Seconds after a capture's last use for which a stopping server waits for its client to fetch or map it."""

HANDOVER_POLL_S = 0.05
"""How often a stopping server looks whether its captures were handed over, in seconds."""


@dataclass(slots=True, kw_only=True, eq=False)
class StoredCapture:
    """One output's captures in the store."""

    key: str
    """The id or token that fetches or releases it; cannot be guessed."""
    owner: str
    """The client it belongs to; no other can see it. "" for a caller without an id: then its key is the right to it."""
    held: LocalCapture
    """The captured rows."""
    output_index: int
    """Index of the output in its request, from 0."""
    session: bytes = b""
    """The shared-memory session that it is leased to and ends with; b"" for held captures."""
    release_token: bytes = b""
    """The token that releases all captures of its request; b"" if there is none."""
    used_at: float = 0.0
    """Time of its last use on the event loop's clock, in seconds."""
    expires_at: float = 0.0
    """When it expires unless it is used, in seconds since 1970."""
    readers: "dict[asyncio.Task[object], Callable[[], object]]" = field(default_factory=dict)
    """Tasks that send it now -> what stops each. Its memory is freed after the last of them."""
    is_gone: bool = False
    """It was released or has expired."""
    timer: asyncio.TimerHandle | None = None
    """The one timer of this capture: expires it, or is set again if it was used meanwhile."""

    @property
    def expires_in_s(self) -> float:
        """Seconds until it expires unless it is used."""
        return max(0.0, self.expires_at - time.time())

    def check_there(self) -> None:
        """Raises NotFound once it was released or has expired, so that no more of it is sent."""
        if self.is_gone:
            raise unknown_capture()


def blocks_of(
    stored: StoredCapture, layers: Sequence[int] | None = None, spans: Spans | None = None
) -> Iterator[CaptureBlock]:
    """The stored rows as blocks, layer by layer: where rows must be joined, only one layer is copied at a time.

    `layers` None means all layers, `spans` None all positions. Raises InvalidRequest if a layer was not captured.
    """
    for layer in chosen_layers(stored.held.metadata.layers, layers):
        captured = stored.held.captured.select((layer,), spans)
        for _, site, hidden in in_order(captured):
            yield CaptureBlock(
                output_index=stored.output_index,
                layer=layer,
                site=site,
                spans=captured.spans,
                hidden=hidden,
                pooling=captured.pooling,
            )


class CaptureStore:
    """Keeps captures until they are released, they expire, or the session that they are leased to ends.

    Belongs to one event loop. A capture expires `ttl_s` seconds after its last use. `count` is called with "released"
    or "expired" and the number of bytes. `keeps_read`: a capture that is being read does not expire, because the send
    timeout ends readers that have stopped.
    """

    def __init__(
        self,
        ttl_s: float,
        count: Callable[[str, int], None],
        *,
        keeps_read: bool = False,
        instance: Instance | None = None,
    ) -> None:
        self._ttl_s = ttl_s
        self._count = count
        self._keeps_read = keeps_read
        self._instance = instance or Instance()
        self._captures: dict[str, StoredCapture] = {}

    def __len__(self) -> int:
        return len(self._captures)

    @property
    def total_bytes(self) -> int:
        """Bytes of all rows in the store."""
        return sum(capture.held.metadata.total_bytes for capture in self._captures.values())

    def all(self) -> list[StoredCapture]:
        """The captures that are in the store now; may be called in any thread."""
        return list(self._captures.values())

    def put(self, event: CaptureHeld, owner: str, session: bytes = b"", release_token: bytes = b"") -> StoredCapture:
        """Takes over the rows of `event`; they are leased to `session` if there is one, else held."""
        capture = StoredCapture(
            key=self._instance.new_id(),
            owner=owner,
            held=_local(event),
            output_index=event.output_index,
            session=session,
            release_token=release_token,
        )
        self._captures[capture.key] = capture
        self.renew(capture)
        self._set_timer(capture)
        return capture

    @contextmanager
    def reading(self, key: str, owner: str, stop: Callable[[], object] | None = None) -> Iterator[StoredCapture]:
        """The held capture, whose memory stays for the duration of the block; raises NotFound.

        If it expires meanwhile, `stop` is called to end the block. Default: the task is cancelled. Leases cannot be
        read: a client could shorten the segment, and reading past its end would kill this process.
        """
        capture = self._find(key, owner)
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
        """Notes a use, which postpones the expiry."""
        capture.used_at = asyncio.get_running_loop().time()
        capture.expires_at = time.time() + self._ttl_s

    async def wait_handed_over(self) -> None:
        """Returns when nothing is read and every capture has gone, or was not used for HANDOVER_S seconds."""
        clock = asyncio.get_running_loop().time
        while any(one.readers or one.used_at + HANDOVER_S > clock() for one in self._captures.values()):
            await asyncio.sleep(HANDOVER_POLL_S)

    def release(self, key: str, owner: str) -> bool:
        """Ends a held capture or a lease; False if this client has none with that key."""
        capture = self._find(key, owner)
        if capture is not None:
            self._end(capture, "released")
        return capture is not None

    def release_all(self, release_token: bytes, owner: str) -> bool:
        """Ends all captures of this client's request with that release token; False if there are none."""
        mine = [one for one in self._captures.values() if one.owner in ("", owner)]
        named = [one for one in mine if hmac.compare_digest(one.release_token, release_token)]
        for capture in named:
            self._end(capture, "released")
        return bool(named)

    def end_session(self, session: bytes) -> None:
        """Ends all leases of a shared-memory session."""
        for capture in [one for one in self._captures.values() if one.session == session]:
            self._end(capture, "released")

    def close(self) -> None:
        """Ends all captures."""
        for capture in list(self._captures.values()):
            self._end(capture, "released")

    def _find(self, key: str, owner: str) -> StoredCapture | None:
        capture = self._captures.get(key)
        return capture if capture is not None and capture.owner in ("", owner) else None

    def _set_timer(self, capture: StoredCapture) -> None:
        """Sets the timer for the expiry. Uses set no timers, since there may be many per second."""
        ends_at = capture.used_at + self._ttl_s
        capture.timer = asyncio.get_running_loop().call_at(ends_at, self._expire_unless_used, capture, capture.used_at)

    def _expire_unless_used(self, capture: StoredCapture, since: float) -> None:
        if capture.readers and self._keeps_read:
            self.renew(capture)
        if capture.used_at > since:
            self._set_timer(capture)
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
        if why == "expired":  # its readers have received nothing for `ttl_s`
            for stop in capture.readers.values():
                stop()
        self._free(capture)

    @staticmethod
    def _free(capture: StoredCapture) -> None:
        if not capture.readers:
            capture.held.release_nowait()
            # An error of a call that knows the capture may live longer than the memory should.
            capture.held.captured = CapturedRows()


def _local(event: CaptureHeld) -> LocalCapture:
    assert isinstance(event.held, LocalCapture), "a server's backend captures into this process's memory"
    return event.held
