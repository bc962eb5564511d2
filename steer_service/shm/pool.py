"""Creates segments within a byte budget for all clients together and for each."""

import collections
import threading
from collections.abc import Callable
from contextlib import suppress

from steer_service.core.errors import OverBudget
from steer_service.core.usage import MemoryUsage
from steer_service.shm.segments import Segment, SegmentDirectory

RETRY_AFTER_S = 1.0
"""Seconds after which a client may ask again for memory that was not free."""

CLIENTS = " of this client's"


class SegmentPool:
    """Creates segments within a byte budget, a budget per client, and the free space of the file system.

    A segment is never reused for a second output: a client could still read it, or a slow worker write it.
    """

    def __init__(
        self,
        budget_bytes: int,
        directory: SegmentDirectory,
        client_budget_bytes: int | None = None,
        client_budget_of: Callable[[str], int | None] | None = None,
    ) -> None:
        self.budget_bytes = budget_bytes
        """Bytes of all segments together at most."""
        self.client_budget_bytes = client_budget_bytes
        """Bytes of one client's segments at most. Default: no limit per client."""
        self._client_budget_of = client_budget_of or (lambda _: None)  # of clients with a budget of their own
        self.reserved_bytes = 0
        """Bytes of the segments that exist now."""
        self.directory = directory
        """The directory of the segments."""
        self.kept_free: Callable[[], int] = lambda: 0
        """Bytes of the file system that segments must leave, since others will write there."""
        self._segments: dict[str, tuple[Segment, str]] = {}  # name -> segment, client
        self._used: collections.Counter[str] = collections.Counter()  # client -> bytes
        # Reentrant: the garbage collector may release a segment inside any of the methods below.
        self._lock = threading.RLock()

    def check(self, size: int, client_id: str = "") -> None:
        """Raises OverBudget (SHM_SPACE) if `size` bytes could not be acquired even if nothing else were in memory."""
        _check_allowed(size, self._allowed_bytes(), "")
        budget = self._budget_of(client_id)
        if budget is not None:
            _check_allowed(size, budget, CLIENTS)

    def acquire(self, size: int, client_id: str = "") -> Segment:
        """Creates a segment of `size` bytes, which counts until it is released; may be called from any thread.

        Raises OverBudget (SHM_SPACE) if a budget or the file system has no room for it. Raises Overloaded (SHM_SPACE)
        if the system runs out of memory or open files. The client_id "" means no client; it has no limit per client.
        """
        with self._lock:
            self._check_room(size, client_id)
            self.reserved_bytes += size
            self._used[client_id] += size
        try:
            segment = self.directory.create(size)
        except BaseException:
            self._free_budget(size, client_id)
            raise
        self._segments[segment.name] = segment, client_id
        return segment

    def release(self, segment: Segment) -> None:
        """Unlinks the segment and frees its bytes in the budget, from any thread; does nothing the second time."""
        _, client_id = self._segments.pop(segment.name, (None, None))
        if client_id is None:
            return
        try:
            segment.unlink()
        finally:
            self._free_budget(segment.size, client_id)

    def close(self) -> None:
        """Releases all segments that are left; mappings stay valid."""
        for segment, _ in list(self._segments.values()):
            self.release(segment)

    @property
    def segment_count(self) -> int:
        """Number of the segments that exist now."""
        return len(self._segments)

    def usage(self) -> MemoryUsage:
        """The segments that exist now; may be called in any thread."""
        limit_bytes = self.budget_bytes
        with suppress(OSError):  # somebody removed the directory
            limit_bytes = self._allowed_bytes()
        return MemoryUsage(used_bytes=self.reserved_bytes, limit_bytes=limit_bytes)

    def client_bytes(self, client_id: str) -> int:
        """Bytes of a client's segments that exist now."""
        return self._used[client_id]

    def _free_budget(self, size: int, client_id: str) -> None:
        with self._lock:
            self.reserved_bytes -= size
            self._used[client_id] -= size
            if not self._used[client_id]:
                del self._used[client_id]

    def _check_room(self, size: int, client_id: str) -> None:
        self.check(size, client_id)
        left = self.budget_bytes - self.reserved_bytes
        free = self.directory.free_bytes()
        left = left if free is None else min(left, free - self.kept_free())
        _check_left(size, left, self._allowed_bytes(), "")
        budget = self._budget_of(client_id)
        if budget is not None:
            _check_left(size, budget - self._used[client_id], budget, CLIENTS)

    def _budget_of(self, client_id: str) -> int | None:
        """Bytes of this client's segments at most; None: no limit of its own."""
        own = self._client_budget_of(client_id) if client_id else None
        return own if own is not None else self.client_budget_bytes if client_id else None

    def _allowed_bytes(self) -> int:
        total = self.directory.total_bytes()
        return self.budget_bytes if total is None else min(self.budget_bytes, max(0, total - self.kept_free()))


def _check_allowed(size: int, allowed: int, whose: str) -> None:
    if size > allowed:
        raise OverBudget(
            f"{size} bytes of capture memory asked for, at most {allowed}{whose} allowed: "
            "capture fewer layers, rows or tokens",
            asked_bytes=size,
            allowed_bytes=allowed,
            reason="SHM_SPACE",
        )


def _check_left(size: int, left: int, allowed: int, whose: str) -> None:
    left = max(0, left)
    if size > left:
        raise OverBudget(
            f"{size} bytes of capture memory asked for, {left} of {allowed}{whose} left",
            asked_bytes=size,
            allowed_bytes=left,
            reason="SHM_SPACE",
            retry_after_s=RETRY_AFTER_S,
        )
