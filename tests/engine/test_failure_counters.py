"""The ledger: counts and greetings that each worker writes and the front end reads."""

from steer_service.engine.failure_counters import Ledger
from steer_service.engine.messages import WorkerReport
from steer_service.shm.segments import SegmentDirectory


def test_greetings_and_counts_of_a_ledger_do_not_share_memory() -> None:
    ledger = Ledger.create(SegmentDirectory(), workers=3, slots=2)
    try:
        theirs = Ledger.open(SegmentDirectory(), ledger.name, workers=3, slots=2)
    finally:
        ledger.unlink()
    theirs.greetings_R[:] = (7, 8, 9)
    theirs.counts_RS[2, 1] += 1

    assert ledger.greetings_R.tolist() == [7, 8, 9]
    assert (ledger.of_slot(0), ledger.of_slot(1), ledger.total()) == (0, 1, 1)


def test_a_replica_that_greets_otherwise_or_not_at_all_is_found() -> None:
    ledger = Ledger.create(SegmentDirectory(), workers=6, slots=1)
    ledger.unlink()

    ledger.greetings_R[:] = (7, 2**64 - 1) * 3
    assert ledger.differing_replica([7, 2**64 - 1]) is None
    ledger.greetings_R[3] = 0
    assert ledger.differing_replica([7, 2**64 - 1]) == 1
    ledger.greetings_R[0] = 8
    assert ledger.differing_replica([7, 2**64 - 1]) == 0


def test_reports_that_say_the_same_have_one_fingerprint() -> None:
    reports = [WorkerReport(layers=(0, 1), hidden_size=8, dtype="float32") for _ in range(2)]
    others = [WorkerReport(layers=(0,), hidden_size=8, dtype="float32"), WorkerReport(refusal="no")]

    assert reports[0].fingerprint == reports[1].fingerprint
    assert len({report.fingerprint for report in [*reports, *others]}) == 3
    assert all(0 < report.fingerprint < 1 << 64 for report in [*reports, *others])
