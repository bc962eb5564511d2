"""A worker's state: slots that hold another program, and layers that were not reached, are noticed."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from steer_service.core.errors import EngineFailed
from steer_service.core.span_table import SpanTable
from steer_service.engine.failure_counters import FailureCounters
from steer_service.engine.messages import WorkerRequest
from steer_service.engine.slots import ProgramLoad
from steer_service.engine.worker.bank import ProgramBank
from steer_service.engine.worker.facts import WorkerFacts
from steer_service.engine.worker.in_flight_steps import InFlightStep, InFlightSteps
from steer_service.engine.worker.requests import TrackedRequest
from steer_service.engine.worker.worker_state import WorkerState
from steer_service.ops.plan import NO_SLOT, PlannedRequest
from steer_service.ops.program import Program, program_to_bytes
from tests.engine.bank_contents import LAYERS, PROGRAMS, SIZE, WIDTH
from tests.engine.worker.test_hooks import STEERED, a_step

NUMBER = 1
FACTS = WorkerFacts(
    layers=tuple(range(LAYERS)),
    layer_count=LAYERS,
    stage_layers=LAYERS,
    hidden_size=WIDTH,
    dtype="float32",
    number=NUMBER,
    stage=0,
    is_last_stage=True,
    writes_rows=True,
)


@pytest.fixture
def counters() -> FailureCounters:
    return FailureCounters.private(workers=2, slots=SIZE.slots)


def state_that_holds(program: Program, counters: FailureCounters) -> WorkerState:
    """The state of a worker, without vLLM's: slot 0 holds `program`."""
    state = WorkerState.__new__(WorkerState)
    state.facts, state._counters = FACTS, counters
    state.bank = ProgramBank(SIZE, FACTS.layers, LAYERS, WIDTH)
    state.bank.load(ProgramLoad(slot=0, digest=program.digest, data=program_to_bytes(program)))
    return state


def tracked(digest: str, slot: int = 0) -> TrackedRequest:
    request = WorkerRequest(
        output="a/0",
        slot=slot,
        digest=digest,
        steered=SpanTable.of(((0, 1),)),
        segment="",
        offset=0,
        stages=1,
        rows=1,
        sites=(),
        layers=(),
        captured=SpanTable.of(()),
        dtype="float32",
        reusable_rows=1,
    )
    nowhere_L = np.zeros(LAYERS, np.int64)
    planned = PlannedRequest(
        slot=slot, steers_L=np.ones(LAYERS, bool), before_L=nowhere_L, after_L=nowhere_L, row_limit=1
    )
    return TrackedRequest(request, planned, None)


def test_a_request_is_never_steered_by_a_program_that_is_not_its_own(counters: FailureCounters) -> None:
    state = state_that_holds(PROGRAMS[1], counters)

    planned = state._planned(tracked(PROGRAMS[0].digest))

    assert planned.slot == NO_SLOT
    assert not planned.steers_L.any()
    assert counters.fault_of(NUMBER) == "WRONG_PROGRAM"
    assert counters.of_slot(0) == 1


@pytest.mark.parametrize(("digest", "slot"), [(PROGRAMS[1].digest, 0), ("", NO_SLOT)])
def test_a_request_with_its_own_program_or_none_is_no_fault(counters: FailureCounters, digest: str, slot: int) -> None:
    request = tracked(digest, slot)

    assert state_that_holds(PROGRAMS[1], counters)._planned(request) is request.planned
    assert not counters.has_faults
    assert not counters.counts_RS.any()


def test_a_step_that_did_not_reach_a_layer_fails(counters: FailureCounters) -> None:
    plan, forward = a_step()
    state = state_that_holds(PROGRAMS[1], counters)
    plan.visited.update(layer for layer in FACTS.layers if layer != STEERED)

    with pytest.raises(EngineFailed, match=rf"layers \[{STEERED}\]") as raised:
        state._complete(InFlightStep(forward, plan.rows))

    assert raised.value.reason == "TAP_MISSED"


@pytest.mark.parametrize("is_last_stage", [False, True])
def test_no_stage_of_a_gpu_waits_for_its_forward_pass_and_earlier_ones_say_that_they_lag(
    counters: FailureCounters, is_last_stage: bool
) -> None:
    state = state_that_holds(PROGRAMS[0], counters)
    state.facts = replace(FACTS, is_last_stage=is_last_stage)
    state.requests, state.proof, state._completes_later = SimpleNamespace(keeps_regions=False), None, True  # type: ignore[assignment]
    completed: list[InFlightStep] = []
    state._in_flight = InFlightSteps(completed.append)
    state._forward, state._batch = SimpleNamespace(end=lambda: None, plan=SimpleNamespace(rows=())), ()  # type: ignore[assignment]

    state.finish_step()

    assert completed == []
    assert state.report().lags == (not is_last_stage)
    state.complete_steps()  # as a fence does
    assert len(completed) == 1
