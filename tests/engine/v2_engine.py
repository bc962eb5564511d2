"""Real vLLM with its V2 model runner on a CPU, every Triton kernel interpreted. Run by test_v2.py."""

from typing import Any

import numpy as np
import pytest
import torch
from vllm.model_executor.models.llama import LlamaMLP

from steer_service.core.specs import SteeringSpec
from steer_service.engine.refusals import WORKER_CLS
from steer_service.engine.region import COMPUTED, NON_FINITE
from steer_service.engine.worker.batch_rows import is_v2
from steer_service.engine.worker.layer_outputs import LAYER_OUTPUTS, LayerOutput
from tests.engine.conftest import BLOCK
from tests.engine.cuda_engine import asks, asynchronous
from tests.engine.dummy_rows import watch_padding
from tests.engine.in_process import Ask, InProcess, in_process
from tests.engine.interpreted import INTERPRETED_WORKER
from tests.engine.oracle import Oracle, relative_error
from tests.engine.test_numbers import direction
from tests.tiny_models import LAYERS, ModelFolder

__all__ = ["asynchronous"]  # a fixture

GPU_FIRST = [
    pytest.param(WORKER_CLS, id="hooks of a CPU", marks=pytest.mark.extended),
    pytest.param(INTERPRETED_WORKER, id="hooks of a GPU"),
]
"""Workers for properties of which the usual run looks at one: the V2 runner is a GPU's."""

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def zeros_of_attention_that_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU vLLM leaves them uninitialised, and Triton's interpreter fails where it samples from nothing but NaN."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    forward = CPUAttentionBackendImpl.forward

    def zeroed(*arguments: Any, output: torch.Tensor, **options: Any) -> torch.Tensor:
        return forward(*arguments, output=output.zero_(), **options)

    monkeypatch.setattr(CPUAttentionBackendImpl, "forward", zeroed)


def check(engine: InProcess, oracle: Oracle, asked: list[Ask]) -> None:
    """Every row of every layer is what the oracle says of the request alone."""
    assert is_v2(engine.worker.model_runner)
    for ask, answer in zip(asked, engine.run(asked), strict=True):
        want = oracle.streams(answer.token_ids[:-1], ask.steering)
        for layer in range(LAYERS):
            assert relative_error(answer.streams[layer], want[layer]) <= TOLERANCE


@pytest.mark.parametrize("worker_cls", GPU_FIRST)
def test_rows_of_a_mixed_batch_equal_the_oracle_and_the_self_test_leaves_no_trace(
    model_folder: ModelFolder, worker_cls: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder("llama")
    seen = watch_padding(monkeypatch, LlamaMLP)
    with in_process(folder, worker_cls=worker_cls) as engine:
        worker = engine.worker
        assert seen
        assert all(padding == [row >= count for row in range(len(padding))] for count, padding in seen)
        assert all(not cache.any() for cache in worker.model_runner.kv_caches)
        assert not worker.steering.bank.op_counts_LS.any()
        assert not worker.steering.bank.directions_WD.any()
        check(engine, Oracle(folder), asks())


@pytest.mark.extended
def test_compiled_rows_equal_the_oracle(model_folder: ModelFolder) -> None:
    folder = model_folder("llama")
    with in_process(folder, worker_cls=INTERPRETED_WORKER, enforce_eager=False) as engine:
        check(engine, Oracle(folder), asks())


@pytest.mark.usefixtures("asynchronous")
@pytest.mark.parametrize("worker_cls", GPU_FIRST)
def test_rows_equal_the_oracle_under_async_scheduling(model_folder: ModelFolder, worker_cls: str) -> None:
    folder = model_folder("llama")
    with in_process(folder, worker_cls=worker_cls) as engine:
        assert engine.llm.llm_engine.vllm_config.scheduler_config.async_scheduling
        check(engine, Oracle(folder), asks())


@pytest.mark.parametrize("worker_cls", GPU_FIRST)
def test_rows_of_requests_that_were_preempted_equal_the_oracle(model_folder: ModelFolder, worker_cls: str) -> None:
    """The V2 runner is told of them as if they were new, with what they generated so far as a part of the prompt."""
    folder = model_folder("llama")
    asked = [
        Ask(
            [2000 + 41 * index + step for step in range(BLOCK - 4)],
            20,
            SteeringSpec.simple_add(1, direction(index), 2.0),
        )
        for index in range(4)
    ]
    with in_process(
        folder, worker_cls=worker_cls, num_gpu_blocks_override=6, block_size=BLOCK, max_model_len=2 * BLOCK
    ) as engine:
        preempted = preemptions(engine)
        check(engine, Oracle(folder), asked)
    assert preempted


def preemptions(engine: InProcess) -> list[str]:
    """A list to which every preempted request is added."""
    seen: list[str] = []
    learn = engine.worker.steering.update_requests

    def learned(scheduler_output: Any) -> None:
        seen.extend(scheduler_output.preempted_req_ids or ())
        learn(scheduler_output)

    engine.worker.steering.update_requests = learned
    return seen


@pytest.mark.parametrize("worker_cls", GPU_FIRST)
def test_keys_and_values_of_rows_that_went_bad_are_zeroed(model_folder: ModelFolder, worker_cls: str) -> None:
    folder = model_folder("llama")
    poison = SteeringSpec.simple_add(1, np.full(direction(1).shape, 3e38), 1.0)
    clean = Ask(range(1000, 1011), 4, SteeringSpec.simple_add(1, direction(1), 2.0))
    with in_process(folder, worker_cls=worker_cls) as engine:
        caches = engine.worker.model_runner.kv_caches
        zeroed: list[str] = []
        zero = engine.worker.steering._kv_zeroer.zero

        def noted(rows: Any) -> None:
            rows = list(rows)
            assert not rows or any(cache.any() for cache in caches)
            zero(rows)
            zeroed.extend(part.request_id for part in rows)

        engine.worker.steering._kv_zeroer.zero = noted
        ((_, region),) = engine.generate([Ask(range(2000, 2011), 1, poison)])
        assert region.count(NON_FINITE, 11) == 11
        assert region.count(COMPUTED, 11) == 0
        if worker_cls == INTERPRETED_WORKER:  # its step is completed with the next one's schedule
            engine.generate([clean])
        assert len(zeroed) == 1
        check(engine, Oracle(folder), [clean])
        assert all(torch.isfinite(cache).all() for cache in caches)


@pytest.mark.parametrize(
    "lie", [LayerOutput.ONE_TENSOR, pytest.param(LayerOutput.FIRST_OF_TWO, marks=pytest.mark.extended)]
)
def test_a_wrong_entry_in_the_table_of_layer_outputs_is_refused(
    model_folder: ModelFolder, lie: LayerOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LAYER_OUTPUTS, "vllm.model_executor.models.llama.LlamaDecoderLayer", lie)

    with in_process(model_folder("llama")) as engine:
        assert is_v2(engine.worker.model_runner)
        assert engine.report.refusal_reason == "TAP_SELF_TEST_FAILED"
