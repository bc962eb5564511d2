"""Counts the bytes of all segments before they are spent."""

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from steer_service.core.errors import OverBudget, Overloaded
from steer_service.shm.segments import DEFAULT_DIRECTORY, Segment, create_segment

RETRY_AFTER_S = 1.0


class SegmentPool:
    """Creates segments within a byte budget and within what the file system has free."""

    def __init__(self, budget_bytes: int, directory: Path = DEFAULT_DIRECTORY) -> None:
        self.budget_bytes = budget_bytes
        """Bytes of all segments together at most."""
        self.reserved_bytes = 0
        """Bytes of the segments that exist now."""
        self.directory = directory
        """Where the segments lie."""
        self._lock = threading.Lock()

    @contextmanager
    def segment(self, size: int) -> Iterator[Segment]:
        """A segment of `size` bytes for the duration of the block; raises OverBudget without room for it."""
        segment = self.acquire(size)
        try:
            yield segment
        finally:
            self.release(segment)

    def acquire(self, size: int) -> Segment:
        """The same for callers that `release` it themselves; may be called from any thread."""
        with self._lock:
            self._check_room(size)
            self.reserved_bytes += size
        try:
            return self._create(size)
        except BaseException:
            self._give_back(size)
            raise

    def release(self, segment: Segment) -> None:
        """Removes the segment's name and gives its bytes back; once per segment."""
        segment.unlink()
        self._give_back(segment.size)

    def _give_back(self, size: int) -> None:
        with self._lock:
            self.reserved_bytes -= size

    def _check_room(self, size: int) -> None:
        system = os.statvfs(self.directory)
        budget = min(self.budget_bytes, system.f_blocks * system.f_frsize)
        left = max(0, min(self.budget_bytes - self.reserved_bytes, system.f_bavail * system.f_frsize))
        if size > budget:
            raise OverBudget(
                f"{size} bytes of capture memory asked for, at most {budget} allowed: "
                "capture fewer layers, rows or tokens",
                asked_bytes=size,
                allowed_bytes=budget,
                reason="SHM_SPACE",
            )
        if size > left:
            raise OverBudget(
                f"{size} bytes of capture memory asked for, {left} of {budget} left",
                asked_bytes=size,
                allowed_bytes=left,
                reason="SHM_SPACE",
                retry_after_s=RETRY_AFTER_S,
            )

    def _create(self, size: int) -> Segment:
        try:
            return create_segment(size, self.directory)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EMFILE, errno.ENFILE):
                raise
            raise Overloaded(
                f"{size} bytes of capture memory asked for, and the system has no room for them",
                reason="SHM_SPACE",
                retry_after_s=RETRY_AFTER_S,
            ) from error
