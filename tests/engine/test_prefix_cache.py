"""Epochs of programs: a failure changes the epoch of its own program, for ever and in every slot."""

import numpy as np

from steer_service.core.specs import SteeringSpec
from steer_service.engine.failure_counters import FailureCounters
from steer_service.engine.prefix_cache import MAX_FAILED_PROGRAMS, ProgramEpochs
from steer_service.engine.slots import ProgramLease, ProgramLoad
from steer_service.ops.program import Program, compile_program


def program(number: int) -> Program:
    return compile_program(SteeringSpec.simple_add(0, np.ones(4), 1.0 + number))


class Bank:
    """Puts programs in slots, as the allocator and the workers do."""

    def __init__(self, slots: int = 2) -> None:
        self.counters = FailureCounters.private(workers=2, slots=slots)
        self.epochs = ProgramEpochs(self.counters)

    def put(self, slot: int, wanted: Program) -> ProgramLease:
        loads = [("", b""), (wanted.digest, b"")]
        self.epochs.record([ProgramLoad(slot=slot, digest=digest, data=data) for digest, data in loads])
        return ProgramLease(slot, wanted, lambda: None)  # type: ignore[arg-type,return-value]

    def fail(self, slot: int) -> None:
        self.counters.counts_RS[1, slot] += 1


def test_a_failure_changes_the_epoch_of_its_program_only() -> None:
    bank = Bank()
    good, bad = bank.put(0, program(0)), bank.put(1, program(1))
    before = bank.epochs.of(good), bank.epochs.of(bad)

    bank.fail(1)

    assert bank.epochs.of(good) == before[0]
    assert bank.epochs.of(bad) != before[1]


def test_a_program_that_returns_to_another_slot_never_has_an_epoch_from_before_its_failure() -> None:
    bank = Bank()
    seen = set()
    for slot in (0, 1, 1, 0):
        lease = bank.put(slot, program(0))
        seen.add(bank.epochs.of(lease))
        bank.fail(slot)
        assert bank.epochs.of(lease) not in seen
        bank.put(slot, program(7))

    assert bank.epochs.of(bank.put(1, program(0))) not in seen


def test_failures_of_an_earlier_program_of_the_slot_do_not_count() -> None:
    bank = Bank()
    first = bank.epochs.of(bank.put(0, program(0)))
    bank.put(0, program(1))
    bank.fail(0)

    assert bank.epochs.of(bank.put(0, program(0))) == first


def test_a_program_that_keeps_its_place_in_a_repeated_message_keeps_its_epoch() -> None:
    bank = Bank()
    bank.put(0, program(0))
    bank.fail(0)
    before = bank.epochs.of(bank.put(0, program(0)))

    assert bank.epochs.of(bank.put(0, program(0))) == before


def test_very_many_programs_that_fail_cost_bounded_memory_and_no_old_epoch_returns() -> None:
    bank = Bank()
    kept = bank.put(1, program(0))
    bank.fail(1)
    epochs = {bank.epochs.of(kept)}
    for number in range(1, MAX_FAILED_PROGRAMS + 2):
        lease = bank.put(0, program(number))
        bank.fail(0)
        epochs.add(bank.epochs.of(lease))

    assert len(bank.epochs._failures) <= MAX_FAILED_PROGRAMS
    bank.put(0, program(9999))
    assert bank.epochs.of(kept) not in epochs
