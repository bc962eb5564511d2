"""What parallel workers, seeded requests and adapters rely on in vLLM, one test per seam."""

import inspect
from dataclasses import fields

import torch
from vllm.config import ParallelConfig
from vllm.lora.ops.torch_ops import bgmv_shrink
from vllm.lora.request import LoRARequest
from vllm.v1.core import kv_cache_utils
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import DPLBAsyncMPClient
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from tests.engine.test_seams import says


def test_replicas_have_numbers_and_only_the_first_answers_a_call() -> None:
    assert "data_parallel_index" in {field.name for field in fields(ParallelConfig)}, says("data_parallel_index")
    source = inspect.getsource(DPLBAsyncMPClient.call_utility_async)
    assert "[0]" in source, says("DPLBAsyncMPClient.call_utility_async returns the first replica's answer")


def test_a_worker_sends_the_stream_on_after_its_runner_has_executed() -> None:
    source = inspect.getsource(Worker.execute_model)
    assert source.index("model_runner.execute_model(") < source.index("isend_tensor_dict("), says(
        "Worker.execute_model"
    )


def test_a_runner_winds_generators_of_discarded_tokens_back() -> None:
    source = inspect.getsource(GPUModelRunner)
    assert "gen.set_offset(gen.get_offset() - 4)" in source, says("set_offset; seeds.py may not be needed any more")
    assert "self.discard_request_mask.np[" in source, says("discard_request_mask")
    assert "sample_tokens" in vars(Worker), says("Worker.sample_tokens")


def test_adapters_have_names_paths_and_prefix_blocks_of_their_own() -> None:
    assert list(inspect.signature(AsyncLLM.add_lora).parameters) == ["self", "lora_request"], says("AsyncLLM.add_lora")
    assert "lora_request" in inspect.signature(AsyncLLM.generate).parameters, says("AsyncLLM.generate")
    assert LoRARequest("name", 1, "path").lora_path == "path", says("LoRARequest")
    source = inspect.getsource(kv_cache_utils._gen_lora_extra_hash_keys)
    assert "lora_name" in source, says("an adapter's name in the keys of blocks")


def test_cpu_kernels_give_requests_without_adapter_the_last_slot() -> None:
    """Once this fails, adapters.py need not keep the last slot empty."""
    slots = torch.stack([torch.zeros(1, 2), torch.ones(1, 2)])
    out = torch.zeros(1, 1)
    bgmv_shrink(torch.ones(1, 2), slots, out, torch.tensor([-1]))
    assert out.item() == 2.0, says("bgmv_shrink")
