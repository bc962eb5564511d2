"""Shared memory for the marks of outputs that are steered and not captured; captures can never fill it.

It is one segment, allocated when the engine starts. Every output has a block of it. A worker that is one step behind
may still write to a block that was freed. The block is therefore handed out again only after a fence, whose reply
proves that the workers have finished every step before it. One fence makes all freed blocks available, so fences are
rare.
"""

import asyncio
import collections
from collections.abc import Awaitable, Callable

from steer_service.core.usage import MemoryUsage
from steer_service.engine.region import ALIGNMENT
from steer_service.shm.segments import Segment, private_segment

MIN_BYTES = 4 << 20
MAX_BYTES = 64 << 20

FILE_SYSTEM_SHARE = 8
"""The mark memory takes at most 1/8 of the file system, but always has room for one output of the full length."""

CLIENT_SHARE = 4
"""One client has at most 1/4 of the mark memory. Further outputs take capture memory for their marks."""


def mark_memory_bytes(marks: int, requests: int, file_system_bytes: int | None) -> int:
    """The size of the mark memory.

    `marks`: of one output of the full length, one byte each. `requests`: that run at once. `file_system_bytes`: None
    without a limit.
    """
    one = _aligned(marks)
    most = MAX_BYTES if file_system_bytes is None else min(MAX_BYTES, file_system_bytes // FILE_SYSTEM_SHARE)
    return max(one, _aligned(min(most, max(MIN_BYTES, one * requests))))


class MarkMemory:
    """Hands out blocks of one segment. All methods belong to one event loop."""

    def __init__(self, segment: Segment, fence: Callable[[], Awaitable[None]]) -> None:
        """`fence`: returns when the workers have finished every step that was sent to them before."""
        self.segment = segment
        """The segment of all blocks."""
        self._fence = fence
        self._free = [(0, segment.size)]  # (offset, size) of free blocks, in order, none adjacent to the next
        self._freed: list[tuple[int, int]] = []  # blocks that workers may still write
        self._used: dict[int, tuple[int, str]] = {}  # offset -> size, client
        self._client_bytes: collections.Counter[str] = collections.Counter()
        self._recycling: asyncio.Task[None] | None = None

    async def acquire(self, size: int, client_id: str = "") -> int | None:
        """The offset of a zeroed block of `size` bytes; None if there is no room, or the client has its share.

        The client_id "" means no client; it has no share of its own. Raises the errors of `fence`.
        """
        size = _aligned(size)
        if client_id and self._client_bytes[client_id] + size > self.segment.size // CLIENT_SHARE:
            return None
        offset = self._take(size)
        while offset is None and self._freed:
            await self._recycle()
            offset = self._take(size)
        if offset is not None:
            self._used[offset] = size, client_id
            self._client_bytes[client_id] += size
            self.segment.memory[offset : offset + size] = bytes(size)
        return offset

    def release(self, offset: int) -> None:
        """Frees a block; its request must have been aborted or have ended."""
        size, client_id = self._used.pop(offset)
        self._freed.append((offset, size))
        self._client_bytes[client_id] -= size
        if not self._client_bytes[client_id]:
            del self._client_bytes[client_id]

    def close(self) -> None:
        """Unmaps the segment as soon as no output has a block of it; no block can be acquired any more."""
        self.segment, self._free, self._freed = private_segment(ALIGNMENT), [], []

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks in use."""
        return self._client_bytes.total()

    def usage(self) -> MemoryUsage:
        """The blocks in use; may be called in any thread."""
        return MemoryUsage(used_bytes=self.used_bytes, limit_bytes=self.segment.size)

    def _take(self, size: int) -> int | None:
        for index, (offset, free) in enumerate(self._free):
            if free >= size:
                self._free[index : index + 1] = [(offset + size, free - size)] if free > size else []
                return offset
        return None

    async def _recycle(self) -> None:
        """Waits for a fence, after which the blocks freed before it are free; all callers share one fence."""
        if self._recycling is None:
            self._recycling = asyncio.ensure_future(self._fence_and_recycle())
            self._recycling.add_done_callback(lambda done: done.cancelled() or done.exception())  # read, if all left
        await asyncio.shield(self._recycling)

    async def _fence_and_recycle(self) -> None:
        freed, self._freed = self._freed, []
        try:
            await self._fence()
        except BaseException:
            self._freed += freed
            raise
        else:
            self._free = _merged(sorted(self._free + freed))
        finally:
            self._recycling = None


def _merged(blocks: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for offset, size in blocks:
        if merged and sum(merged[-1]) == offset:
            merged[-1] = merged[-1][0], merged[-1][1] + size
        else:
            merged.append((offset, size))
    return merged


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
