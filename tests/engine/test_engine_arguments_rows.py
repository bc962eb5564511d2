"""Every row of every request is the right one, in every way vLLM cuts, reuses, repeats and spreads work.

On the deterministic model (tests/engine/deterministic_model) each row of the stream names itself, so "right" is exact.
"""

from pathlib import Path
from typing import Any

import pytest

from steer_service.core.errors import Unsupported
from steer_service.engine import engine
from steer_service.engine.failure_counters import FailureCounters
from steer_service.engine.mark_memory import MarkMemory
from tests.engine.async_scheduling import force_async_scheduling
from tests.engine.closing import close_in_the_middle_of_a_captured_request, leaves_nothing
from tests.engine.conftest import own_segments
from tests.engine.deterministic_model.drive import Drive, deterministic_engine, drive

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

SCARCE = 33
"""Blocks of a KV cache for 1,000 tokens: far less than 32 sequences want that grow by up to 80 tokens each."""
LEAST = 18
"""Blocks of the smallest KV cache that takes one token more than the model's length, and vLLM's empty block."""

FEW_MARKS = 1 << 10
"""Bytes of marks: far less than those of 80 requests."""

CHUNKED = {"long_prefill_token_threshold": 24}
"""A long prompt gets 24 of a step's 64 rows."""


def use_blocks_of_marks_again_and_again(monkeypatch: pytest.MonkeyPatch) -> list[MarkMemory]:
    """Makes the mark memory too small for all requests; returns a list that grows with each fence for it."""
    fences: list[MarkMemory] = []
    recycle = MarkMemory._fence_and_recycle

    async def counted(marks: MarkMemory) -> None:
        fences.append(marks)
        await recycle(marks)

    monkeypatch.setattr(MarkMemory, "_fence_and_recycle", counted)
    monkeypatch.setattr(engine, "mark_memory_bytes", lambda *_: FEW_MARKS)
    return fences


@pytest.mark.extended
async def test_chunked_prefill_and_prefix_cache_hits(tmp_path: Path) -> None:
    """The usual run has both in test_tensor_parallel_with_chunked_prefill_and_prefix_cache_hits."""
    with deterministic_engine(tmp_path, **CHUNKED) as model:
        done = await drive(model, tmp_path, seed=1)
    check_chunked(done)


def check_chunked(done: Drive) -> None:
    """Several prompts were in the middle of theirs at once, blocks were reused, and no row was computed twice."""
    assert done.faults == []
    assert done.cancelled > 5
    assert done.trace.prefills_together >= 2
    assert done.trace.recomputed == 0
    assert any(rows % 32 == 0 for rows in done.reused)


@pytest.mark.extended
async def test_preemption_and_recompute(tmp_path: Path) -> None:
    """The usual run has it in test_data_parallel_with_async_scheduling_and_preemption."""
    with deterministic_engine(tmp_path, num_gpu_blocks_override=SCARCE, max_num_batched_tokens=96) as model:
        done = await drive(model, tmp_path, seed=2, most_tokens=80)
    assert done.faults == []
    assert done.trace.recomputed > 0


@pytest.mark.extended
async def test_async_scheduling_with_preemption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual run has both in test_data_parallel_with_async_scheduling_and_preemption."""
    force_async_scheduling(monkeypatch)
    with deterministic_engine(tmp_path, num_gpu_blocks_override=SCARCE) as model:
        assert model._engine._services.llm.vllm_config.scheduler_config.async_scheduling
        done = await drive(model, tmp_path, seed=7, most_tokens=80)
    assert done.faults == []
    assert done.trace.recomputed > 0


@pytest.mark.extended
async def test_compiled(tmp_path: Path) -> None:
    with deterministic_engine(tmp_path, enforce_eager=False) as model:
        done = await drive(model, tmp_path, seed=3)
    assert done.faults == []
    assert done.trace.recomputed == 0


async def test_tensor_parallel_with_chunked_prefill_and_prefix_cache_hits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fences = use_blocks_of_marks_again_and_again(monkeypatch)
    with deterministic_engine(tmp_path, tensor_parallel_size=2, **CHUNKED) as model:
        done = await drive(model, tmp_path, seed=1, tensor_parallel=2)
    check_chunked(done)
    assert done.trace.workers == {0, 1}
    assert fences


@pytest.mark.extended
@pytest.mark.parametrize("size", [2, 3])
async def test_tensor_parallel(tmp_path: Path, size: int) -> None:
    with deterministic_engine(tmp_path, tensor_parallel_size=size) as model:
        done = await drive(model, tmp_path, seed=4, tensor_parallel=size)
    assert done.faults == []
    assert done.trace.recomputed == 0
    assert done.trace.workers == set(range(size))


@pytest.mark.parametrize("count", [80, pytest.param(200, marks=pytest.mark.extended)])
async def test_pipeline_parallel(tmp_path: Path, count: int) -> None:
    """Compiled, as stock vLLM's pipeline fails otherwise on a CPU."""
    with deterministic_engine(tmp_path, pipeline_parallel_size=2, enforce_eager=False) as model:
        done = await drive(model, tmp_path, seed=5, count=count)
    assert done.faults == []
    assert done.trace.recomputed == 0
    assert done.trace.workers == {0, 1}


@pytest.mark.extended
async def test_tensor_and_pipeline_parallel(tmp_path: Path) -> None:
    sizes = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    with deterministic_engine(tmp_path, **sizes, enforce_eager=False) as model:
        done = await drive(model, tmp_path, seed=8, tensor_parallel=2)
    assert done.faults == []
    assert done.trace.recomputed == 0
    assert done.trace.workers == {0, 1, 2, 3}


async def test_data_parallel_with_async_scheduling_and_preemption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The next step is scheduled before the last one's tokens are known: vLLM's default on a GPU, never on a CPU."""
    force_async_scheduling(monkeypatch)
    fences = use_blocks_of_marks_again_and_again(monkeypatch)
    with (
        leaves_nothing(),
        deterministic_engine(tmp_path, data_parallel_size=2, num_gpu_blocks_override=LEAST) as model,
    ):
        assert model._engine._services.llm.vllm_config.scheduler_config.async_scheduling
        done = await drive(model, tmp_path, seed=7, most_tokens=80, count=80)
        await close_in_the_middle_of_a_captured_request(model)
    assert fences
    assert "EngineDeadError" not in capfd.readouterr().out  # vLLM logs to standard output
    assert done.faults == []
    assert done.trace.recomputed > 0
    assert done.trace.workers == {0, 1}


@pytest.mark.extended
async def test_data_parallel(tmp_path: Path) -> None:
    with deterministic_engine(tmp_path, data_parallel_size=2) as model:
        done = await drive(model, tmp_path, seed=6)
    assert done.faults == []
    assert done.trace.recomputed == 0
    assert done.trace.workers == {0, 1}


@pytest.mark.extended
async def test_workers_that_do_not_see_the_servers_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on another host: the failure counters are gone before they open them; all goes through the executor."""
    create = FailureCounters.create

    def created(*args: Any) -> FailureCounters:
        counters = create(*args)
        counters.unlink()
        return counters

    monkeypatch.setattr(FailureCounters, "create", created)
    with deterministic_engine(tmp_path, tensor_parallel_size=2) as model:
        assert model._engine._services.regions.remote is not None
        done = await drive(model, tmp_path, seed=9, tensor_parallel=2)
    assert done.faults == []
    assert done.cancelled > 5
    assert done.trace.workers == {0, 1}


@pytest.mark.parametrize(
    "arguments",
    [
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2, "enforce_eager": False},
    ],
    ids=["tensor", "pipeline"],
)
@pytest.mark.extended
def test_a_wrong_layer_output_is_refused_at_start_by_every_worker(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """The layers return the stream in two parts; said to be in the first, it would be read and written wrongly."""
    before = own_segments()
    with pytest.raises(Unsupported, match="residual stream") as refused:
        with deterministic_engine(tmp_path, steer_allow_unverified="first_of_two", **arguments):
            pass
    assert refused.value.reason == "TAP_SELF_TEST_FAILED"
    assert own_segments() == before
