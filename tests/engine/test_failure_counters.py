"""The failure counters: counts and fingerprints that each worker writes and the front end reads."""

import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from steer_service.core.errors import EngineFailed
from steer_service.engine.failure_counters import FailureCounters
from steer_service.engine.messages import WorkerReport
from steer_service.shm.segments import SegmentDirectory


def test_fingerprints_and_counts_do_not_share_memory() -> None:
    counters = FailureCounters.create(SegmentDirectory(), workers=3, slots=2)
    try:
        theirs = FailureCounters.open(SegmentDirectory(), counters.name, workers=3, slots=2)
    finally:
        counters.unlink()
    theirs.fingerprints_R[:] = (7, 8, 9)
    theirs.counts_RS[2, 1] += 1

    assert counters.fingerprints_R.tolist() == [7, 8, 9]
    assert (counters.of_slot(0), counters.of_slot(1)) == (0, 1)


class SlowCells(dict[tuple[int, int], int]):
    """Cells that let other threads go on between a read and the write that follows from it."""

    def __getitem__(self, cell: tuple[int, int]) -> int:
        value = super().__getitem__(cell)
        time.sleep(0.001)
        return value


def test_no_failure_is_lost_that_two_threads_count() -> None:
    counters, times = FailureCounters.private(2, 3), 50
    counters.counts_RS = cells = SlowCells({(1, 2): 0})  # type: ignore[assignment]
    with ThreadPoolExecutor(2) as threads:
        for _ in range(2):
            threads.submit(lambda: [counters.count_failure(1, 2) for _ in range(times)])

    assert cells[1, 2] == 2 * times


def test_a_replica_with_other_fingerprints_or_none_is_found() -> None:
    counters = FailureCounters.create(SegmentDirectory(), workers=6, slots=1)
    counters.unlink()

    counters.fingerprints_R[:] = (7, 2**64 - 1) * 3
    assert counters.differing_replica([7, 2**64 - 1]) is None
    counters.fingerprints_R[3] = 0
    assert counters.differing_replica([7, 2**64 - 1]) == 1
    counters.fingerprints_R[0] = 8
    assert counters.differing_replica([7, 2**64 - 1]) == 0


def test_reports_that_say_the_same_have_one_fingerprint() -> None:
    reports = [WorkerReport(layers=(0, 1), hidden_size=8, dtype="float32") for _ in range(2)]
    others = [WorkerReport(layers=(0,), hidden_size=8, dtype="float32"), WorkerReport(refusal="no")]

    assert reports[0].fingerprint == reports[1].fingerprint
    assert len({report.fingerprint for report in [*reports, *others]}) == 3
    assert all(0 < report.fingerprint < 1 << 64 for report in [*reports, *others])


def test_the_first_fault_of_a_worker_is_seen_by_the_other_side_and_names_the_worker() -> None:
    counters = FailureCounters.create(SegmentDirectory(), workers=3, slots=2)
    try:
        theirs = FailureCounters.open(SegmentDirectory(), counters.name, workers=3, slots=2)
    finally:
        counters.unlink()
    counters.check_faults()
    assert not counters.has_faults

    theirs.report_fault(1, "TAP_MISSED")
    theirs.report_fault(1, "ZeroDivisionError")

    with pytest.raises(EngineFailed, match=r"worker 1 of the engine is out of order \(TAP_MISSED\)") as raised:
        counters.check_faults()
    assert counters.has_faults
    assert raised.value.reason == "ENGINE_DIED"
    assert [counters.fault_of(worker) for worker in range(3)] == ["", "TAP_MISSED", ""]
    assert not counters.counts_RS.any()


@pytest.mark.parametrize("reason", ["", "E" * 200, "Ünsound"])
def test_any_name_of_a_fault_fits_its_cell(reason: str) -> None:
    counters = FailureCounters.private(workers=2, slots=1)

    counters.report_fault(0, reason)

    assert counters.fault_of(0) == reason.encode("ascii", "replace").decode()[:64]
    assert counters.fault_of(1) == ""


def test_closed_counters_are_unmapped_and_keep_what_was_written() -> None:
    segment = SegmentDirectory().create(1000)
    segment.unlink()
    counters, mapping = FailureCounters(segment, workers=2, slots=2), weakref.ref(segment.memory)
    del segment
    counters.counts_RS[1, 0] = 3
    counters.report_fault(1, "WRONG_PROGRAM")

    counters.close()

    assert mapping() is None
    assert (counters.of_slot(0), counters.of_slot(1), counters.fault_of(1)) == (3, 0, "WRONG_PROGRAM")
