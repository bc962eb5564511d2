"""Both runners' rows: each belongs to the request at its place in the batch, at its position.

One suite for both adapters. Its truth is what the model was fed in real steps (tests/engine/recorded): the V1 batch is
the recorded one, the V2 batch is vLLM's own InputBatch filled for the same steps as V2's prepare_inputs fills it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.worker.gpu.input_batch import InputBatch

from steer_service.core.errors import EngineFailed, Unsupported
from steer_service.engine.worker.batch_rows import rows_of_v1, rows_of_v2, watch_rows
from steer_service.ops.plan import RequestRows
from tests.engine.recorded.host_v2 import HostV2, without_device
from tests.engine.recorded.steps import Recording, Step, recordings

Part = tuple[str, int, int]
"""A request, its rows in the step, and the position of the first."""


def batch_of_v1(parts: Sequence[Part], room: int = 32) -> SimpleNamespace:
    """The part of the V1 runner's InputBatch that is read; its arrays are longer than the batch."""
    computed = np.full(room, 999, np.int32)
    computed[: len(parts)] = [position for _, _, position in parts]
    return SimpleNamespace(req_ids=[name for name, _, _ in parts], num_computed_tokens_cpu=computed)


def batch_of_v2(
    parts: Sequence[Part], *, drafts: dict[str, int] | None = None, padded: int = 0, padded_tokens: int = 0
) -> InputBatch:
    """vLLM's own dataclass, filled as V2's prepare_inputs does, with `padded` requests and `padded_tokens` too many."""
    counts = np.array([count for _, count, _ in parts], np.int32)
    total = int(counts.sum())
    starts = np.empty(len(parts) + padded + 1, np.int32)
    starts[0] = 0
    np.cumsum(counts, out=starts[1 : len(parts) + 1])
    starts[len(parts) + 1 :] = total
    per_request = np.array([(drafts or {}).get(name, 0) for name, _, _ in parts], np.int32)
    known = {
        "req_ids": [name for name, _, _ in parts],
        "num_reqs": len(parts),
        "num_reqs_after_padding": len(parts) + padded,
        "num_scheduled_tokens": counts,
        "num_tokens": total,
        "num_tokens_after_padding": total + padded_tokens,
        "num_draft_tokens": int(per_request.sum()),
        "num_draft_tokens_per_req": per_request if drafts else None,
        "query_start_loc_np": starts,
        "num_computed_tokens_np": np.array([position for _, _, position in parts], np.int32),
    }
    return InputBatch(**{part.name: known.get(part.name) for part in dataclasses.fields(InputBatch)})  # type: ignore[arg-type]


def of_v1(parts: Sequence[Part], drafts: dict[str, int] | None = None) -> list[RequestRows]:
    return rows_of_v1(batch_of_v1(parts), np.array([count for _, count, _ in parts], np.int32))


def of_v2(parts: Sequence[Part], drafts: dict[str, int] | None = None) -> list[RequestRows]:
    return rows_of_v2(batch_of_v2(parts, drafts=drafts))


def of_padded_v2(parts: Sequence[Part], drafts: dict[str, int] | None = None) -> list[RequestRows]:
    return rows_of_v2(batch_of_v2(parts, drafts=drafts, padded=3, padded_tokens=5))


ADAPTERS = {"V1": of_v1, "V2": of_v2, "V2 padded for a CUDA graph": of_padded_v2}


@pytest.fixture(params=ADAPTERS)
def rows_of(request: pytest.FixtureRequest) -> Callable[..., list[RequestRows]]:
    return ADAPTERS[request.param]


def laid_out(parts: Sequence[Part]) -> list[RequestRows]:
    """The truth in the batch order of `parts`."""
    starts = np.cumsum([0, *(count for _, count, _ in parts)]).tolist()
    return [RequestRows(name, starts[i], count, position) for i, (name, count, position) in enumerate(parts)]


def in_order_of_v2(step: Step) -> list[Part]:
    """The recorded step in the order in which the V2 runner of vLLM 0.32 batches it (`sort_batch_req_ids`)."""
    longest = 1 + max(step.drafts.values(), default=0)
    return sorted(step.fed, key=lambda part: (not step.drafts.get(part[0]), part[1] != longest, part[1]))


STEPS = [
    pytest.param(step, id=f"{name}-{number}")
    for name in recordings()
    for number, step in enumerate(Recording.load(name).steps)
]


def has_recorded(name: str, test: Callable[[Step, Step], object]) -> bool:
    """True if two successive steps of a recording pass the test."""
    steps = Recording.load(name).steps
    return any(test(before, after) for before, after in pairwise(steps))


def test_the_recordings_hold_the_steps_that_they_are_named_after() -> None:
    def is_reordered(before: Step, after: Step) -> bool:
        """A request that was in both steps has changed places with another."""
        both = set(before.req_ids) & set(after.req_ids)
        return [r for r in before.req_ids if r in both] != [r for r in after.req_ids if r in both]

    assert has_recorded("chunked_prefill", lambda _, after: any(c > 1 and p > 0 for _, c, p in after.fed))
    assert has_recorded("mixed", lambda _, after: {1} < {count for _, count, _ in after.fed})
    assert has_recorded("finishes", lambda before, after: bool(after.finished) and is_reordered(before, after))
    assert has_recorded("prefix_hit", lambda _, after: any(r in after.new and p > 0 for r, _, p in after.fed))
    assert has_recorded("preemption", lambda _, after: bool(after.preempted))
    assert has_recorded("preemption", lambda _, after: bool(after.resumed))
    assert has_recorded("speculative", lambda before, after: bool(after.drafts) and len(after.fed) > 1)
    assert has_recorded(
        "speculative",  # drafts were rejected: the request goes on before the end of its rows
        lambda before, after: any(
            r == other and r in before.drafts and p < q + c for r, c, q in before.fed for other, _, p in after.fed
        ),
    )


@pytest.mark.parametrize("step", STEPS)
def test_a_recorded_v1_batch_gives_the_rows_that_the_model_was_fed(step: Step) -> None:
    batch = SimpleNamespace(
        req_ids=step.req_ids, num_computed_tokens_cpu=np.array(step.num_computed_tokens_cpu, np.int32)
    )

    rows = rows_of_v1(batch, np.array(step.num_scheduled_tokens, np.int32))

    assert rows == laid_out(step.fed)
    assert {part.request_id: part.row_count for part in rows} == step.scheduled


@pytest.mark.parametrize("step", STEPS)
def test_a_recorded_step_gives_the_same_rows_from_either_runner(step: Step, rows_of) -> None:  # type: ignore[no-untyped-def]
    assert rows_of(step.fed, step.drafts) == laid_out(step.fed)


@pytest.mark.parametrize("step", STEPS)
def test_a_recorded_step_in_the_order_of_v2_gives_the_same_requests_the_same_rows(step: Step, rows_of) -> None:  # type: ignore[no-untyped-def]
    parts = in_order_of_v2(step)

    rows = rows_of(parts, step.drafts)

    assert rows == laid_out(parts)
    assert {(part.request_id, part.row_count, part.first_position) for part in rows} == set(step.fed)


@pytest.mark.parametrize("padded", [0, 2], ids=["unpadded", "padded for a CUDA graph"])
@pytest.mark.parametrize("step", STEPS)
def test_a_recorded_step_prepared_by_vllms_own_v2_code_gives_the_same_requests_the_same_rows(
    step: Step, padded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_device(monkeypatch)
    runner, heard = HostV2(step), []
    watch_rows(runner, heard.append)

    batch = runner.step(step, padded=padded, padded_tokens=3 * padded)

    [rows] = heard
    assert [part.request_id for part in rows] == batch.req_ids
    assert {(part.request_id, part.row_count, part.first_position) for part in rows} == set(step.fed)
    of_rows = [part.first_position + i for part in rows for i in range(part.row_count)]
    assert of_rows == batch.positions[: len(of_rows)].tolist()  # where the device would put them
    assert [part.first_row for part in rows] == batch.query_start_loc[: len(rows)].tolist()
    assert len(batch.query_start_loc_np) == len(rows) + padded + 1


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 1000)), max_size=20))
def test_rows_follow_each_other_without_gap_in_batch_order(requests: list[tuple[int, int]]) -> None:
    parts = [(f"request-{index}", count, position) for index, (count, position) in enumerate(requests)]

    for rows_of in ADAPTERS.values():
        rows = rows_of(parts)

        assert rows == laid_out(parts)
        assert all(type(part.first_row) is type(part.row_count) is type(part.first_position) is int for part in rows)


@pytest.mark.parametrize("layout", [[0, 3, 4], [0, 1, 4], [1, 3, 6]], ids=["fewer drafts", "moved drafts", "an offset"])
def test_a_v2_batch_that_is_laid_out_on_the_device_is_refused(layout: list[int]) -> None:
    batch = batch_of_v2([("a", 3, 10), ("b", 3, 20)], drafts={"a": 2, "b": 2})
    batch.query_start_loc_np = np.array(layout, np.int32)

    with pytest.raises(EngineFailed, match="known on the device only") as raised:
        rows_of_v2(batch)

    assert raised.value.reason == "ROWS_UNKNOWN"


class V1Runner:
    """The seam of vLLM's V1 runner: preparing the inputs is what settles the order of the batch."""

    def __init__(self) -> None:
        self.input_batch = batch_of_v1([("unsettled", 1, 0)])

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> str:
        if scheduler_output.fails:
            raise RuntimeError("no block left")
        self.input_batch = batch_of_v1(scheduler_output.parts)
        return "prepared"

    def step(self, schedule: Any) -> Any:
        return self._prepare_inputs(schedule, np.array([count for _, count, _ in schedule.parts], np.int32))


class V2Runner:
    """The seam of vLLM's V2 runner in 0.24: prepare_inputs makes the batch, a dummy batch is made without it."""

    def __init__(self) -> None:
        self.req_states = SimpleNamespace()
        self.prepared: Any = None

    def prepare_inputs(self, scheduler_output: Any, batch_desc: Any) -> InputBatch:
        if scheduler_output.fails:
            raise RuntimeError("no block left")
        self.prepared = batch_of_v2(scheduler_output.parts, padded=1)
        return self.prepared

    def step(self, schedule: Any) -> Any:
        return self.prepare_inputs(schedule, batch_desc=None)


class V2RunnerOf033(V2Runner):
    """The same with the arguments of 0.32 and 0.33."""

    def prepare_inputs(  # type: ignore[override]
        self, scheduler_output: Any, batch_req_state: Any, batch_desc: Any, num_active_loras: int
    ) -> InputBatch:
        return V2Runner.prepare_inputs(self, scheduler_output, batch_desc)

    def step(self, schedule: Any) -> Any:
        return self.prepare_inputs(schedule, None, None, 0)


RUNNERS = {"V1": V1Runner, "V2 of 0.24": V2Runner, "V2 of 0.33": V2RunnerOf033}
SEAM_OF = {"V1": "_prepare_inputs", "V2 of 0.24": "prepare_inputs", "V2 of 0.33": "prepare_inputs"}


def schedule(*parts: Part, fails: bool = False) -> SimpleNamespace:
    return SimpleNamespace(parts=parts, fails=fails)


@pytest.fixture(params=RUNNERS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_listener_hears_of_every_step_in_its_final_order(kind: str) -> None:
    runner, heard = RUNNERS[kind](), []
    watch_rows(runner, heard.append)

    runner.step(schedule(("a", 1, 4), ("b", 3, 0)))
    runner.step(schedule(("b", 1, 3)))

    assert heard == [[RequestRows("a", 0, 1, 4), RequestRows("b", 1, 3, 0)], [RequestRows("b", 0, 1, 3)]]


def test_the_runner_gets_the_inputs_that_it_prepared(kind: str) -> None:
    runner = RUNNERS[kind]()
    watch_rows(runner, lambda rows: None)

    prepared = runner.step(schedule(("a", 1, 4)))

    assert prepared == "prepared" if kind == "V1" else prepared is runner.prepared


def test_arguments_may_be_named() -> None:
    runner = V1Runner()
    watch_rows(runner, lambda rows: None)

    assert (
        runner._prepare_inputs(scheduler_output=schedule(), num_scheduled_tokens=np.array([], np.int32)) == "prepared"
    )


def test_other_runners_of_the_process_are_left_alone(kind: str) -> None:
    seam = SEAM_OF[kind]
    before = getattr(RUNNERS[kind], seam)
    watched, other, heard = RUNNERS[kind](), RUNNERS[kind](), []
    watch_rows(watched, heard.append)

    other.step(schedule(("a", 1, 4)))
    RUNNERS[kind]().step(schedule(("a", 1, 4)))

    assert heard == []
    assert getattr(RUNNERS[kind], seam) is before
    assert seam not in vars(other)


def test_a_step_that_fails_before_its_batch_is_settled_is_not_heard_of(kind: str) -> None:
    runner, heard = RUNNERS[kind](), []
    watch_rows(runner, heard.append)

    with pytest.raises(RuntimeError, match="no block left"):
        runner.step(schedule(("a", 1, 4), fails=True))

    assert heard == []


def test_an_error_of_the_listener_stops_the_step(kind: str) -> None:
    runner = RUNNERS[kind]()

    def refuse(rows: Any) -> None:
        raise ValueError("cannot plan this")

    watch_rows(runner, refuse)

    with pytest.raises(ValueError, match="cannot plan this"):
        runner.step(schedule(("a", 1, 4)))


def test_a_dummy_batch_of_v2_is_not_heard_of() -> None:
    """V2 makes it with InputBatch.make_dummy; that execute_model does so is checked in test_seams.py."""
    torch = pytest.importorskip("torch")
    from vllm.v1.worker.gpu.input_batch import InputBuffers

    runner, heard = V2Runner(), []
    watch_rows(runner, heard.append)

    dummy = InputBatch.make_dummy(2, 5, InputBuffers(max_num_reqs=4, max_num_tokens=8, device=torch.device("cpu")))

    assert len(dummy.req_ids) == 2
    assert heard == []


@pytest.mark.parametrize(
    "runner",
    [
        SimpleNamespace(prepare_inputs=lambda scheduler_output: None, input_batch=None),
        SimpleNamespace(_prepare_inputs=lambda scheduler_output: None),
        object(),
    ],
    ids=["half of each", "no batch", "neither"],
)
def test_a_runner_without_the_seam_is_refused_by_name(runner: Any) -> None:
    with pytest.raises(Unsupported, match=f"{type(runner).__name__} has neither _prepare_inputs and") as raised:
        watch_rows(runner, lambda rows: None)

    assert raised.value.reason == "UNKNOWN_RUNNER"


def test_a_v2_runner_that_splits_prompts_over_ranks_is_refused() -> None:
    runner, heard = V2Runner(), []
    watch_rows(runner, heard.append)
    runner.pcp_manager = object()  # type: ignore[attr-defined]  # as in 0.32, after the model is loaded

    with pytest.raises(Unsupported, match="splits a request's rows over ranks"):
        runner.step(schedule(("a", 1, 4)))

    assert heard == []
