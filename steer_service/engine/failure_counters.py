"""How often each slot's program failed to leave finite rows behind, written by the workers as it happens.

A row that is not finite after steering stays unsteered, and its keys and values lie in blocks that later requests with
the same steering would reuse. The count outlives the request that met it, and is raised before any token of the step
is visible: whoever reuses prefix-cache blocks can tell whether they may be void.

Each worker also greets here: an RPC returns the answers of the first replica only.
"""

from collections.abc import Sequence

import numpy as np

from steer_service.shm.segments import Segment, SegmentDirectory, private_segment


class Ledger:
    """Counters in shared memory, one row per worker of all replicas, one column per slot; they only ever grow."""

    def __init__(self, segment: Segment, workers: int, slots: int) -> None:
        self._segment = segment
        cells = np.frombuffer(segment.memory, np.uint64, workers * (slots + 1))
        self.counts_RS = cells[workers:].reshape(workers, slots)
        """Shape [workers, slots]; each worker writes its own row only."""
        self.greetings_R = cells[:workers]
        """Shape [workers]; each worker's `WorkerReport.fingerprint`, 0 until it has opened the ledger."""

    @classmethod
    def create(cls, directory: SegmentDirectory, workers: int, slots: int) -> "Ledger":
        """A zeroed ledger, for the front end; `unlink` it once every worker has opened it."""
        return cls(directory.create(8 * workers * (slots + 1)), workers, slots)

    @classmethod
    def open(cls, directory: SegmentDirectory, name: str, workers: int, slots: int) -> "Ledger":
        """The ledger that the front end created, for a worker."""
        return cls(directory.open(name, 8 * workers * (slots + 1)), workers, slots)

    @classmethod
    def private(cls, workers: int, slots: int) -> "Ledger":
        """A ledger that nobody else sees, for a worker that cannot open the front end's."""
        return cls(private_segment(8 * workers * (slots + 1)), workers, slots)

    @property
    def name(self) -> str:
        """The segment's name, for the workers."""
        return self._segment.name

    def unlink(self) -> None:
        """Removes the name; the memory lives as long as its users."""
        self._segment.unlink()

    def differing_replica(self, fingerprints: Sequence[int]) -> int | None:
        """The first replica whose workers did not greet with these fingerprints, in order; None if all did."""
        greetings = self.greetings_R.reshape(-1, len(fingerprints))
        wrong = (greetings != np.array(fingerprints, np.uint64)).any(axis=1)
        return int(wrong.argmax()) if wrong.any() else None

    def of_slot(self, slot: int) -> int:
        """Failures of whatever stood in `slot`, all workers together."""
        return int(self.counts_RS[:, slot].sum())

    def total(self) -> int:
        """Failures of all slots and workers."""
        return int(self.counts_RS.sum())
