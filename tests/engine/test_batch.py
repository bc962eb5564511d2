"""Rows of the V1 runner: each belongs to the request at its place in the batch, at its position."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.errors import Unsupported
from steer_service.engine.batch import rows_of_v1, watch_rows
from steer_service.ops.plan import RequestRows


def batch(requests: list[tuple[str, int]], room: int = 32) -> SimpleNamespace:
    """The part of vLLM's InputBatch that is read; its arrays are longer than the batch."""
    computed = np.full(room, 999, np.int32)
    computed[: len(requests)] = [position for _, position in requests]
    return SimpleNamespace(req_ids=[request_id for request_id, _ in requests], num_computed_tokens_cpu=computed)


# (request id, tokens computed before the step) in batch order, tokens of the step, and the rows that they take.
BATCHES = {
    "a prefill alone": ([("a-1", 0)], [7], [("a-1", 0, 7, 0)]),
    "decodes before a prefill": (
        [("a-1", 7), ("c-3", 12), ("b-2", 0)],
        [1, 1, 20],
        [("a-1", 0, 1, 7), ("c-3", 1, 1, 12), ("b-2", 2, 20, 0)],
    ),
    "the second chunk of a prompt": ([("a-1", 8), ("b-2", 32)], [1, 18], [("a-1", 0, 1, 8), ("b-2", 1, 18, 32)]),
    "a prefill after a hit in the prefix cache": ([("d-4", 64)], [3], [("d-4", 0, 3, 64)]),
    "a request that starts again after preemption": (
        [("a-1", 30), ("b-2", 0)],
        [1, 25],
        [("a-1", 0, 1, 30), ("b-2", 1, 25, 0)],
    ),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_gives_the_rows_of_its_requests(name: str) -> None:
    requests, counts, want = BATCHES[name]

    rows = rows_of_v1(batch(requests), np.array(counts, np.int32))

    assert rows == [RequestRows(*row) for row in want]


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 1000)), max_size=20))
def test_rows_follow_each_other_without_gap_in_batch_order(requests: list[tuple[int, int]]) -> None:
    ids = [f"request-{index}" for index in range(len(requests))]

    rows = rows_of_v1(
        batch([(name, position) for name, (_, position) in zip(ids, requests, strict=True)]),
        np.array([count for count, _ in requests], np.int32),
    )

    assert [part.request_id for part in rows] == ids
    assert [part.first_row for part in rows] == [sum(count for count, _ in requests[:i]) for i in range(len(requests))]
    assert [(part.row_count, part.first_position) for part in rows] == requests
    assert all(type(part.first_row) is type(part.row_count) is type(part.first_position) is int for part in rows)


class Runner:
    """The seam of vLLM's V1 runner: preparing the inputs is what settles the order of the batch."""

    def __init__(self) -> None:
        self.input_batch = batch([("unsettled", 0)])
        self.fails = False

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> str:
        if self.fails:
            raise RuntimeError("no block left")
        self.input_batch = batch(scheduler_output.requests)
        return "prepared"


STEP = SimpleNamespace(requests=[("a", 4), ("b", 0)])
COUNTS = np.array([1, 3], np.int32)


def test_the_listener_hears_of_every_step_in_its_final_order() -> None:
    runner, heard = Runner(), []
    watch_rows(runner, heard.append)

    runner._prepare_inputs(STEP, COUNTS)
    runner._prepare_inputs(SimpleNamespace(requests=[("b", 3)]), np.array([1], np.int32))

    assert heard == [[RequestRows("a", 0, 1, 4), RequestRows("b", 1, 3, 0)], [RequestRows("b", 0, 1, 3)]]


def test_the_runner_gets_what_it_prepared() -> None:
    runner = Runner()
    watch_rows(runner, lambda rows: None)

    assert runner._prepare_inputs(STEP, COUNTS) == "prepared"
    assert runner._prepare_inputs(scheduler_output=STEP, num_scheduled_tokens=COUNTS) == "prepared"


def test_other_runners_of_the_process_are_left_alone() -> None:
    before = Runner._prepare_inputs
    watched, other, heard = Runner(), Runner(), []
    watch_rows(watched, heard.append)

    other._prepare_inputs(STEP, COUNTS)
    Runner()._prepare_inputs(STEP, COUNTS)

    assert heard == []
    assert Runner._prepare_inputs is before
    assert "_prepare_inputs" not in vars(other)


def test_a_step_that_fails_before_its_batch_is_settled_is_not_heard_of() -> None:
    runner, heard = Runner(), []
    runner.fails = True
    watch_rows(runner, heard.append)

    with pytest.raises(RuntimeError, match="no block left"):
        runner._prepare_inputs(STEP, COUNTS)

    assert heard == []


def test_an_error_of_the_listener_stops_the_step() -> None:
    runner = Runner()

    def refuse(rows: Any) -> None:
        raise ValueError("cannot plan this")

    watch_rows(runner, refuse)

    with pytest.raises(ValueError, match="cannot plan this"):
        runner._prepare_inputs(STEP, COUNTS)


@pytest.mark.parametrize(
    "runner",
    [
        SimpleNamespace(prepare_inputs=lambda scheduler_output: None, input_batch=None),
        SimpleNamespace(_prepare_inputs=lambda scheduler_output: None),
        object(),
    ],
    ids=["V2 runner", "no batch", "neither"],
)
def test_a_runner_without_the_seam_is_refused_by_name(runner: Any) -> None:
    with pytest.raises(Unsupported, match=f"{type(runner).__name__} has no _prepare_inputs and input_batch") as raised:
        watch_rows(runner, lambda rows: None)

    assert raised.value.reason == "UNKNOWN_RUNNER"
