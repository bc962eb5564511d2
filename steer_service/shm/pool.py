"""Counts the bytes of all segments before they are spent, in all and for each client."""

import collections
import os
import threading

from steer_service.core.errors import OverBudget
from steer_service.shm.segments import Segment, SegmentDirectory

RETRY_AFTER_S = 1.0


class SegmentPool:
    """Creates segments within a byte budget, each client's share of it, and what the file system has free.

    A segment is never used for a second output: whoever has seen it once, a client or a worker that is late, could
    still read or write it.
    """

    def __init__(self, budget_bytes: int, directory: SegmentDirectory, client_budget_bytes: int | None = None) -> None:
        self.budget_bytes = budget_bytes
        """Bytes of all segments together at most."""
        self.client_budget_bytes = client_budget_bytes
        """Bytes of the segments of one client at most. Default: no limit of their own."""
        self.reserved_bytes = 0
        """Bytes of the segments that exist now."""
        self.directory = directory
        """Where the segments lie."""
        self._segments: dict[str, tuple[Segment, str]] = {}  # name -> segment, client
        self._used: collections.Counter[str] = collections.Counter()  # client -> bytes
        # Whatever releases a segment may run inside any of the calls below, by the garbage collector's doing.
        self._lock = threading.RLock()

    def acquire(self, size: int, client_id: str = "") -> Segment:
        """A segment of `size` bytes until it is released; may be called from any thread.

        Raises OverBudget without room for it, Overloaded if the system has none. The client_id "" names no client
        and has no limit of its own.
        """
        with self._lock:
            self._check_room(size, client_id)
            self.reserved_bytes += size
            self._used[client_id] += size
        try:
            segment = self.directory.create(size)
        except BaseException:
            self._give_back(size, client_id)
            raise
        self._segments[segment.name] = segment, client_id
        return segment

    def release(self, segment: Segment) -> None:
        """Removes the segment's name and gives its bytes back, from any thread; does nothing after `close`."""
        _, client_id = self._segments.pop(segment.name, (None, None))
        if client_id is None:
            return
        try:
            segment.unlink()
        finally:
            self._give_back(segment.size, client_id)

    def close(self) -> None:
        """Releases what nobody has released; what is mapped stays valid."""
        for segment, _ in list(self._segments.values()):
            self.release(segment)

    def client_bytes(self, client_id: str) -> int:
        """Bytes of a client's segments."""
        return self._used[client_id]

    def _give_back(self, size: int, client_id: str) -> None:
        with self._lock:
            self.reserved_bytes -= size
            self._used[client_id] -= size
            if not self._used[client_id]:
                del self._used[client_id]

    def _check_room(self, size: int, client_id: str) -> None:
        system = os.statvfs(self.directory.path)
        budget, left = self.budget_bytes, self.budget_bytes - self.reserved_bytes
        if system.f_blocks:  # a tmpfs without a limit says that it has none
            budget = min(budget, system.f_blocks * system.f_frsize)
            left = min(left, system.f_bavail * system.f_frsize)
        _check(size, budget, left, "")
        if client_id and self.client_budget_bytes is not None:
            _check(
                size, self.client_budget_bytes, self.client_budget_bytes - self._used[client_id], " of this client's"
            )


def _check(size: int, budget: int, left: int, whose: str) -> None:
    left = max(0, left)
    if size > budget:
        raise OverBudget(
            f"{size} bytes of capture memory asked for, at most {budget}{whose} allowed: "
            "capture fewer layers, rows or tokens",
            asked_bytes=size,
            allowed_bytes=budget,
            reason="SHM_SPACE",
        )
    if size > left:
        raise OverBudget(
            f"{size} bytes of capture memory asked for, {left} of {budget}{whose} left",
            asked_bytes=size,
            allowed_bytes=left,
            reason="SHM_SPACE",
            retry_after_s=RETRY_AFTER_S,
        )
