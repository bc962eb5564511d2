"""The number of times that each slot's program left rows that were not finite, counted by the workers.

A row that is not finite after steering stays unsteered, and its keys and values are in blocks that later requests with
the same steering would reuse. The count outlives the request and is raised before any token of the step is visible.
A request that reuses prefix-cache blocks therefore knows whether they may be wrong.

Each worker also writes the fingerprint of its WorkerReport here, because an RPC returns the replies of the first
data-parallel replica only.
"""

from collections.abc import Sequence

import numpy as np

from steer_service.shm.segments import Segment, SegmentDirectory, private_segment


class FailureCounters:
    """Counters in shared memory: one row per worker of all replicas, one column per slot. They only grow."""

    def __init__(self, segment: Segment, workers: int, slots: int) -> None:
        self._segment = segment
        cells = np.frombuffer(segment.memory, np.uint64, workers * (slots + 1))
        self.counts_RS = cells[workers:].reshape(workers, slots)
        """Shape [workers, slots]. Each worker writes its own row only."""
        self.fingerprints_R = cells[:workers]
        """Shape [workers]. Each worker's `WorkerReport.fingerprint`; 0 until the worker has opened the counters."""

    @classmethod
    def create(cls, directory: SegmentDirectory, workers: int, slots: int) -> "FailureCounters":
        """Zeroed counters, for the API server process. Call `unlink` once every worker has opened them."""
        return cls(directory.create(8 * workers * (slots + 1)), workers, slots)

    @classmethod
    def open(cls, directory: SegmentDirectory, name: str, workers: int, slots: int) -> "FailureCounters":
        """The counters that the API server process created, for a worker."""
        return cls(directory.open(name, 8 * workers * (slots + 1)), workers, slots)

    @classmethod
    def private(cls, workers: int, slots: int) -> "FailureCounters":
        """Counters for a worker that cannot open the API server process's."""
        return cls(private_segment(8 * workers * (slots + 1)), workers, slots)

    @property
    def name(self) -> str:
        """The segment's name, for the workers."""
        return self._segment.name

    def unlink(self) -> None:
        """Removes the name. The memory lives as long as its users."""
        self._segment.unlink()

    def differing_replica(self, fingerprints: Sequence[int]) -> int | None:
        """The first replica whose workers did not write these fingerprints, in order; None if all did."""
        written = self.fingerprints_R.reshape(-1, len(fingerprints))
        is_wrong = (written != np.array(fingerprints, np.uint64)).any(axis=1)
        return int(is_wrong.argmax()) if is_wrong.any() else None

    def of_slot(self, slot: int) -> int:
        """Failures of the programs that were in `slot`, all workers together."""
        return int(self.counts_RS[:, slot].sum())

    def total(self) -> int:
        """Failures of all slots and workers."""
        return int(self.counts_RS.sum())
