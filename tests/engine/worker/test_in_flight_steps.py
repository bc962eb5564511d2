"""Steps that a device is still at: completed in order, once, and before their tokens are seen."""

import inspect
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.executor.multiproc_executor import WorkerProc
from vllm.v1.executor.uniproc_executor import AsyncOutputFuture
from vllm.v1.outputs import AsyncModelRunnerOutput

from steer_service.core.errors import EngineFailed
from steer_service.engine.worker.in_flight_steps import InFlightStep, InFlightSteps
from steer_service.ops.plan import RequestRows


def step(*request_ids: str) -> InFlightStep:
    rows = [RequestRows(request_id, index, 1, 0) for index, request_id in enumerate(request_ids)]
    return InFlightStep(SimpleNamespace(plan=SimpleNamespace(rows=rows)), rows)  # type: ignore[arg-type]


class Output(AsyncModelRunnerOutput):
    """vLLM's output of a step, whose tokens are still on the device."""

    def get_output(self) -> Any:
        return "tokens"


@pytest.fixture
def done() -> list[InFlightStep]:
    return []


@pytest.fixture
def in_flight(done: list[InFlightStep]) -> InFlightSteps:
    return InFlightSteps(done.append)


def test_an_output_completes_the_steps_up_to_its_own_when_it_is_read(
    in_flight: InFlightSteps, done: list[InFlightStep]
) -> None:
    steps = [step("a"), step("b")]
    outputs = []
    for one in steps:
        in_flight.add(one)
        outputs.append(in_flight.hand_over(Output()))
    assert done == []

    assert outputs[0].get_output() == "tokens"
    assert done == steps[:1]
    assert outputs[1].get_output() == "tokens"
    assert done == steps


def test_steps_whose_output_nobody_reads_do_not_pile_up(in_flight: InFlightSteps, done: list[InFlightStep]) -> None:
    steps = [step("a") for _ in range(5)]
    for one in steps:
        in_flight.add(one)
    assert done == steps[:3]


def test_an_output_that_is_complete_is_handed_over_after_its_steps(
    in_flight: InFlightSteps, done: list[InFlightStep]
) -> None:
    assert in_flight.hand_over("nothing under way") == "nothing under way"
    in_flight.add(step("a"))

    assert in_flight.hand_over("tokens") == "tokens"
    assert len(done) == 1


def test_steps_of_a_request_are_completed_before_it_is_removed(
    in_flight: InFlightSteps, done: list[InFlightStep]
) -> None:
    in_flight.add(step("a", "b"))
    in_flight.add(step("b"))

    in_flight.release(["c"])
    assert done == []
    in_flight.release(["a"])
    assert len(done) == 2


def test_a_step_is_completed_only_once(done: list[InFlightStep]) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def complete(one: InFlightStep) -> None:
        begun.set()
        assert go_on.wait(10)
        done.append(one)

    in_flight = InFlightSteps(complete)
    in_flight.add(step("a"))
    askers = [threading.Thread(target=in_flight.release, args=(["a"],)) for _ in range(2)]
    for asker in askers:
        asker.start()
    assert begun.wait(10)
    in_flight.add(step("b"))  # nobody who hands a step to the device waits for another
    go_on.set()
    for asker in askers:
        asker.join(10)

    assert done[0].batch[0].request_id == "a"
    assert len(done) == len({id(one) for one in done})


def test_a_failed_step_raises_for_every_caller_that_needs_it() -> None:
    def complete(_: InFlightStep) -> None:
        raise EngineFailed("a layer was missed", reason="TAP_MISSED")

    in_flight = InFlightSteps(complete)
    in_flight.add(step("a"))
    with pytest.raises(EngineFailed, match="a layer was missed"):
        in_flight.hand_over(Output()).get_output()


@pytest.mark.parametrize("asks", [WorkerProc.enqueue_output, AsyncOutputFuture.result])
def test_vllm_asks_an_output_before_its_tokens_are_seen(asks: Callable[..., Any]) -> None:
    assert ".get_output()" in inspect.getsource(asks)
