"""Salts of the prefix cache, and epochs of programs: a failure changes that of its own program, for ever."""

import numpy as np

from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import SteeringSpec
from steer_service.engine.failure_counters import FailureCounters
from steer_service.engine.prefix_cache import MAX_FAILED_PROGRAMS, ProgramEpochs, cache_salt
from steer_service.engine.slots import ProgramLease, ProgramLoad
from steer_service.ops.program import Program, compile_program
from steer_service.runtime.prepare import prepare
from steer_service.runtime.prompts import RenderedPrompt
from steer_service.testing.fake_backend import FAKE_MODEL


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


async def salt(bank: Bank, lease: ProgramLease | None, *, given: str = "", positions: int | None = None) -> str | None:
    """The salt of a request with two prompt tokens."""
    steering = SteeringSpec.simple_add(0, np.ones(FAKE_MODEL.hidden_size), positions=positions)
    request = GenerateRequest(
        prompt=TokenPrompt(token_ids=(1, 2)),
        sampling=SamplingOptions(max_tokens=2),
        steering=steering if lease is not None else None,
        cache_salt=given,
    )

    async def render(_: GenerateRequest) -> RenderedPrompt:
        return RenderedPrompt(token_ids=(1, 2))

    return cache_salt(await prepare(request, FAKE_MODEL, render), lease, bank.epochs)


async def test_requests_share_a_salt_only_if_their_rows_are_the_same() -> None:
    bank = Bank()
    one, other = bank.put(0, program(0)), bank.put(1, program(1))
    salts = [
        await salt(bank, None),
        await salt(bank, None, given="a"),
        await salt(bank, None, given="b"),
        await salt(bank, one),
        await salt(bank, one, given="a"),
        await salt(bank, one, positions=0),
        await salt(bank, one, positions=1),
        await salt(bank, other),
    ]

    assert salts[0] is None
    assert len(set(salts)) == len(salts)
    assert await salt(bank, one) == salts[3]


async def test_a_program_that_failed_has_another_salt() -> None:
    bank = Bank()
    good, bad = bank.put(0, program(0)), bank.put(1, program(1))
    before = await salt(bank, good), await salt(bank, bad)

    bank.fail(1)

    assert await salt(bank, good) == before[0]
    assert await salt(bank, bad) != before[1]
