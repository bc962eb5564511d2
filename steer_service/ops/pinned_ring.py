"""A fixed amount of the host's memory, in parts that are taken and freed in about the same order.

A device copies into it while it does other work. Such memory is pinned, and slow to allocate: it is allocated once.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from steer_service.core.errors import EngineFailed
from steer_service.ops.cuda_tables import LINE


@dataclass(eq=False, slots=True)
class RingPart:
    """A part of the memory, until `PinnedRing.free`."""

    memory: torch.Tensor
    """Its bytes, uint8."""
    start: int
    end: int
    empty: Callable[[], None]
    """Takes out what is in it and frees it; called for the oldest parts when a new one finds no room."""
    is_free: bool = False


class PinnedRing:
    """The memory. One thread takes parts; any may free them."""

    def __init__(self, memory: torch.Tensor) -> None:
        """`memory`: all of it, uint8."""
        self._memory = memory
        self._parts: deque[RingPart] = deque()  # oldest first
        self._lock = threading.Lock()  # never held while a part is emptied

    @property
    def size(self) -> int:
        """All of its bytes."""
        return len(self._memory)

    def take(self, size: int, empty: Callable[[], None]) -> RingPart:
        """A part of `size` bytes; empties the oldest parts until there is room.

        Raises EngineFailed (STAGING_FULL) if it is larger than the ring.
        """
        if size > self.size:
            raise EngineFailed(
                f"a step copies {size} bytes to the host, which has {self.size} for it", reason="STAGING_FULL"
            )
        while True:
            with self._lock:
                start = self._room(-(-size // LINE) * LINE)
                if start is not None:
                    part = RingPart(self._memory[start : start + size], start, start + -(-size // LINE) * LINE, empty)
                    self._parts.append(part)
                    return part
                oldest = self._parts[0]
            oldest.empty()

    def free(self, part: RingPart) -> None:
        """Lets others use the part's memory; freeing it again does nothing."""
        with self._lock:
            part.is_free = True
            while self._parts and self._parts[0].is_free:
                self._parts.popleft()

    def _room(self, size: int) -> int | None:
        """Where so many free bytes begin; None if there are none in one piece."""
        if not self._parts:
            return 0
        first, last = self._parts[0].start, self._parts[-1].end
        if last <= first and self._parts[-1].start < first:  # the parts go over the end of the memory
            return last if last + size <= first else None
        if last + size <= self.size:
            return last
        return 0 if size <= first else None
