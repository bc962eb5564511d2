"""What the engine relies on in vLLM, one test per seam: each fails with a plain sentence if its seam moves."""

import inspect
from dataclasses import fields

import pytest
import vllm
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import TokensPrompt
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.worker.gpu_input_batch import InputBatch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from steer_service.engine.config import REFUSALS, WORKER_CLS
from steer_service.engine.conventions import CONVENTIONS, Convention

VERIFIED = "0.32"
"""The version all of this was verified on."""


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def says(seam: str) -> str:
    return f"{seam}: not as in vLLM {VERIFIED}; this is vLLM {vllm.__version__}"


def test_a_worker_class_can_be_named() -> None:
    assert {"worker_cls", "additional_config"} <= {field.name for field in fields(AsyncEngineArgs)}, says("EngineArgs")
    assert "additional_config" in {field.name for field in fields(VllmConfig)}, says("VllmConfig")


def test_the_worker_loads_its_model_and_executes_steps_in_methods_that_can_be_extended() -> None:
    assert "load_model" in vars(Worker), says("Worker.load_model")
    assert parameters(Worker.execute_model)[:2] == ["self", "scheduler_output"], says("Worker.execute_model")
    module, name = WORKER_CLS.rsplit(".", 1)
    assert name in vars(__import__(module, fromlist=[name])), f"{WORKER_CLS} does not exist"


def test_the_runner_prepares_its_inputs_once_the_batch_has_its_order() -> None:
    assert parameters(GPUModelRunner._prepare_inputs)[:3] == [
        "self",
        "scheduler_output",
        "num_scheduled_tokens",
    ], says("GPUModelRunner._prepare_inputs")
    source = inspect.getsource(GPUModelRunner.execute_model)
    assert source.index("self._update_states(") < source.index("self._prepare_inputs("), says("execute_model")


def test_the_batch_knows_its_order_and_how_far_each_request_is() -> None:
    source = inspect.getsource(InputBatch)
    assert "def req_ids" in source, says("InputBatch.req_ids")
    assert "self.num_computed_tokens_cpu" in source, says("InputBatch.num_computed_tokens_cpu")


def test_the_schedule_names_new_and_finished_requests() -> None:
    assert {"scheduled_new_reqs", "finished_req_ids", "num_scheduled_tokens"} <= {
        field.name for field in fields(SchedulerOutput)
    }, says("SchedulerOutput")
    assert {"req_id", "sampling_params"} <= {field.name for field in fields(NewRequestData)}, says("NewRequestData")


def test_a_request_carries_arguments_of_ours_and_may_refuse_cached_blocks() -> None:
    params = SamplingParams(extra_args={"steer": {"layers": [1], "digest": "d"}}, skip_reading_prefix_cache=True)
    assert params.extra_args == {"steer": {"layers": [1], "digest": "d"}}, says("SamplingParams.extra_args")
    assert params.skip_reading_prefix_cache is True, says("SamplingParams.skip_reading_prefix_cache")


def test_a_prompt_carries_a_salt() -> None:
    assert "cache_salt" in TokensPrompt.__optional_keys__, says("TokensPrompt.cache_salt")


def test_the_front_end_calls_workers_and_aborts_what_is_closed() -> None:
    assert parameters(AsyncLLM.collective_rpc)[:5] == ["self", "method", "timeout", "args", "kwargs"], says(
        "AsyncLLM.collective_rpc"
    )
    assert parameters(AsyncLLM.generate)[:4] == ["self", "prompt", "sampling_params", "request_id"], says(
        "AsyncLLM.generate"
    )
    source = inspect.getsource(AsyncLLM.generate)
    assert "GeneratorExit" in source, says("AsyncLLM.generate aborts when it is closed")
    assert "timeout" in parameters(AsyncLLM.shutdown), says("AsyncLLM.shutdown")


@pytest.mark.parametrize("layer", [LlamaDecoderLayer, Qwen3DecoderLayer])
def test_a_verified_layer_returns_hidden_and_residual(layer: type) -> None:
    assert CONVENTIONS[f"{layer.__module__}.{layer.__qualname__}"] is Convention.HIDDEN_AND_RESIDUAL
    assert inspect.getsource(layer.forward).rstrip().endswith("return hidden_states, residual"), says(layer.__name__)


def test_every_refused_argument_exists() -> None:
    known = {field.name for field in fields(AsyncEngineArgs)}
    assert set(REFUSALS) <= known, says(f"engine arguments {sorted(set(REFUSALS) - known)}")
