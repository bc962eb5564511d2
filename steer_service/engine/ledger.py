"""How often each slot's program failed to leave finite rows behind, written by the workers as it happens.

A row that is not finite after steering stays unsteered, and its keys and values lie in blocks that later requests with
the same steering would reuse. The count outlives the request that met it, and is raised before any token of the step
is visible: whoever reuses prefix-cache blocks can tell whether they may be void.
"""

import numpy as np

from steer_service.shm.segments import Segment, create_segment, open_segment


class Ledger:
    """Counters in shared memory, one row per worker rank, one column per slot; they only ever grow."""

    def __init__(self, segment: Segment, ranks: int, slots: int) -> None:
        self._segment = segment
        self.counts_RS = np.frombuffer(segment.memory, np.uint64, ranks * slots).reshape(ranks, slots)
        """Shape [ranks, slots]; each rank writes its own row only."""

    @classmethod
    def create(cls, ranks: int, slots: int) -> "Ledger":
        """A zeroed ledger, for the front end; `unlink` it once every worker has opened it."""
        return cls(create_segment(8 * ranks * slots), ranks, slots)

    @classmethod
    def open(cls, name: str, ranks: int, slots: int) -> "Ledger":
        """The ledger that the front end created, for a worker."""
        return cls(open_segment(name, 8 * ranks * slots), ranks, slots)

    @property
    def name(self) -> str:
        """The segment's name, for the workers."""
        return self._segment.name

    def unlink(self) -> None:
        """Removes the name; the memory lives as long as its users."""
        self._segment.unlink()

    def of_slot(self, slot: int) -> int:
        """Failures of whatever stood in `slot`, all ranks together."""
        return int(self.counts_RS[:, slot].sum())

    def total(self) -> int:
        """Failures of all slots and ranks."""
        return int(self.counts_RS.sum())
