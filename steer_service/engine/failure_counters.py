"""What the workers tell the API server process through shared memory: failures of programs, and faults of their own.

Failures: the number of times that each slot's program left rows that were not finite. A row that is not finite after
steering stays unsteered, and its keys and values are in blocks that later requests with the same steering would reuse.
The count outlives the request and is raised before any token of the step is visible. A request that reuses prefix-cache
blocks therefore knows whether they may be wrong.

Faults: an error in a worker's code. vLLM reads the output of one worker only, so an error of another one would be lost.
A worker with a fault is out of order: its rows may be unsteered, or the other workers wait for it.

Each worker also writes the fingerprint of its WorkerReport here, because an RPC returns the replies of the first
data-parallel replica only.
"""

import threading
from collections.abc import Sequence

import numpy as np

from steer_service.core.errors import EngineFailed
from steer_service.shm.segments import Segment, SegmentDirectory, private_copy, private_segment

FAULT_BYTES = 64
"""Bytes of a worker's fault: ASCII, padded with zeros."""


class FailureCounters:
    """Cells in shared memory, one row per worker of all replicas. Each worker writes its own row only."""

    def __init__(self, segment: Segment, workers: int, slots: int) -> None:
        self._workers = workers
        self._slots = slots
        self._counting = threading.Lock()
        """Of this worker's threads: one may complete a step while another plans the next."""
        self._use(segment)

    def _use(self, segment: Segment) -> None:
        workers, slots = self._workers, self._slots
        self._segment = segment
        cells = np.frombuffer(segment.memory, np.uint64, workers * (slots + 1))
        self.counts_RS = cells[workers:].reshape(workers, slots)
        """Shape [workers, slots]. Failures of the programs in each slot; they only grow."""
        self.fingerprints_R = cells[:workers]
        """Shape [workers]. Each worker's `WorkerReport.fingerprint`; 0 until the worker has opened the counters."""
        self._faults = memoryview(segment.memory)[cells.nbytes : cells.nbytes + FAULT_BYTES * workers]
        self._fault_starts = self._faults[::FAULT_BYTES]
        self._no_faults = bytes(workers)

    @classmethod
    def create(cls, directory: SegmentDirectory, workers: int, slots: int) -> "FailureCounters":
        """Zeroed counters, for the API server process. Call `unlink` once every worker has opened them."""
        return cls(directory.create(_size(workers, slots)), workers, slots)

    @classmethod
    def open(cls, directory: SegmentDirectory, name: str, workers: int, slots: int) -> "FailureCounters":
        """The counters that the API server process created, for a worker."""
        return cls(directory.open(name, _size(workers, slots)), workers, slots)

    @classmethod
    def private(cls, workers: int, slots: int) -> "FailureCounters":
        """Counters for a worker that cannot open the API server process's."""
        return cls(private_segment(_size(workers, slots)), workers, slots)

    @property
    def name(self) -> str:
        """The segment's name, for the workers."""
        return self._segment.name

    def unlink(self) -> None:
        """Removes the name. The memory lives as long as its users."""
        self._segment.unlink()

    def close(self) -> None:
        """Unmaps the segment; what the workers have written until now can still be read."""
        self._use(private_copy(self._segment))

    def differing_replica(self, fingerprints: Sequence[int]) -> int | None:
        """The first replica whose workers did not write these fingerprints, in order; None if all did."""
        written = self.fingerprints_R.reshape(-1, len(fingerprints))
        is_wrong = (written != np.array(fingerprints, np.uint64)).any(axis=1)
        return int(is_wrong.argmax()) if is_wrong.any() else None

    def count_failure(self, worker: int, slot: int) -> None:
        """Counts one failure of the program in `slot`, in any thread of the worker."""
        with self._counting:
            self.counts_RS[worker, slot] += 1

    def of_slot(self, slot: int) -> int:
        """Failures of the programs that were in `slot`, all workers together."""
        return int(self.counts_RS[:, slot].sum())

    def report_fault(self, worker: int, reason: str) -> None:
        """Writes a worker's fault, unless it has one. `reason`: a name, which must not have anything of a request."""
        cell = self._faults[FAULT_BYTES * worker : FAULT_BYTES * (worker + 1)]
        text = reason.encode("ascii", "replace")[:FAULT_BYTES]
        if not cell[0] and text:
            cell[1 : len(text)] = text[1:]
            cell[0] = text[0]  # last, so that no reader sees half of it

    def fault_of(self, worker: int) -> str:
        """A worker's fault; "" if it has none."""
        cell = bytes(self._faults[FAULT_BYTES * worker : FAULT_BYTES * (worker + 1)])
        return cell.rstrip(b"\0").decode("ascii", "replace") if cell[0] else ""

    @property
    def has_faults(self) -> bool:
        """True if a worker has a fault."""
        return self._fault_starts != self._no_faults

    def check_faults(self) -> None:
        """Raises EngineFailed (ENGINE_DIED) if a worker has a fault. It is called for each token of each output."""
        if not self.has_faults:
            return
        for worker in range(len(self.fingerprints_R)):
            if fault := self.fault_of(worker):
                raise EngineFailed(
                    f"worker {worker} of the engine is out of order ({fault}); requests in flight are lost",
                    reason="ENGINE_DIED",
                )


def _size(workers: int, slots: int) -> int:
    return workers * (8 * (slots + 1) + FAULT_BYTES)
