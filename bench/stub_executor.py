"""An executor for vLLM without a model: each sampled token is the next of a fixed text, at the pace of a GPU.

vLLM's front end, its engine core and our server around them then run as on a GPU, on any machine. It computes nothing:
steering and captures are answered as if they had been done, so it is admitted in benchmarks only.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.worker_base import CompilationTimes

BACKEND = "bench.stub_executor.StubExecutor"
"""The value of `distributed_executor_backend`."""

STEP_SECONDS = "BENCH_STEP_SECONDS"
"""Environment variable: the least time of a step. Default: none."""

CACHE_BYTES = 4 << 30
"""Memory that it says is there for keys and values."""

TOKENS = tuple(range(1000, 2000))
"""Token ids that requests get in turn: ordinary ones, with texts of different lengths."""


ARGUMENTS: dict[str, Any] = {
    "distributed_executor_backend": BACKEND,
    "max_num_seqs": 1024,
    "max_num_batched_tokens": 8192,
    "enable_prefix_caching": False,
}
"""Engine arguments: as vLLM's own server has them on an H100."""


def admit() -> None:
    """Lets our engine take the executor, in this process."""
    from steer_service.engine.refusals import REFUSALS, Refusal

    REFUSALS["distributed_executor_backend"] = Refusal((BACKEND,), "this is a benchmark without a model")


class StubExecutor(Executor):
    """Answers vLLM's engine core, and our engine's calls of its workers."""

    def _init_executor(self) -> None:
        self._step_s = float(os.environ.get(STEP_SECONDS, "0"))
        self._next_step = 0.0
        self._sampled: dict[str, int] = {}  # request -> number of its tokens so far
        self._left: dict[str, int] = {}  # request -> rows of its prompt that were not scheduled yet

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
    ) -> Any:
        """The replies of the one worker that there would be."""
        answer = [getattr(self, f"_{method}", self._nothing)(*args, **(kwargs or {}))]
        if not non_block:
            return answer
        future: Future[Any] = Future()
        future.set_result(answer)
        return future

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """One token for each request whose prompt is computed."""
        output = self._run(scheduler_output)
        if not non_block:
            return output
        future: Future[Any] = Future()
        future.set_result(output)
        return future

    def check_health(self) -> None:
        """Always healthy."""

    def _run(self, scheduler_output: Any) -> ModelRunnerOutput:
        now = time.monotonic()
        if self._step_s:
            time.sleep(max(0.0, self._next_step - now))
            self._next_step = max(now, self._next_step) + self._step_s
        for request_id in scheduler_output.finished_req_ids:
            self._sampled.pop(request_id, None)
            self._left.pop(request_id, None)
        for new in scheduler_output.scheduled_new_reqs:
            self._left[new.req_id] = len(new.prompt_token_ids) - new.num_computed_tokens
            self._sampled.setdefault(new.req_id, 0)
        request_ids = list(scheduler_output.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=request_ids,
            req_id_to_index={request_id: index for index, request_id in enumerate(request_ids)},
            sampled_token_ids=[
                self._sample(request_id, count) for request_id, count in scheduler_output.num_scheduled_tokens.items()
            ],
        )

    def _sample(self, request_id: str, scheduled: int) -> list[int]:
        left = self._left[request_id]
        self._left[request_id] = max(0, left - scheduled)
        if left > scheduled:
            return []  # a part of the prompt
        number = self._sampled[request_id]
        self._sampled[request_id] = number + 1
        return [TOKENS[number % len(TOKENS)]]

    def _nothing(self, *_: Any, **__: Any) -> None:
        return None

    def _get_kv_cache_spec(self) -> dict[str, FullAttentionSpec]:
        model = self.model_config
        spec = FullAttentionSpec(
            block_size=self.cache_config.block_size,
            num_kv_heads=model.get_num_kv_heads(self.parallel_config),
            head_size=model.get_head_size(),
            dtype=model.dtype,
        )
        return {f"model.layers.{layer}.self_attn": spec for layer in range(model.get_total_num_hidden_layers())}

    def _get_supported_kv_cache_layouts(self) -> list[str]:
        return ["NHD", "HND"]

    def _determine_available_memory(self) -> int:
        return CACHE_BYTES

    def _compile_or_warm_up_model(self) -> CompilationTimes:
        return CompilationTimes(language_model=0.0, encoder=0.0)

    def _get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def _supports_draft_weight_updates(self) -> bool:
        return False

    def _steering_report(self, counters_name: str, workers: int, marks: tuple[str, int]) -> dict[str, Any]:
        """What `SteeringWorker.steering_report` says of a model whose layers all have hooks."""
        from steer_service.engine.config import SteeringConfig
        from steer_service.engine.failure_counters import FailureCounters
        from steer_service.engine.messages import WorkerReport

        config, model = SteeringConfig.from_vllm(self.vllm_config), self.model_config
        self._counters = FailureCounters.open(config.segments, counters_name, workers, config.slots)
        report = WorkerReport(
            layers=tuple(range(model.get_total_num_hidden_layers())),
            hidden_size=model.get_hidden_size(),
            dtype=str(model.dtype).removeprefix("torch."),
        )
        self._counters.fingerprints_R[0] = report.fingerprint
        return report.to_rpc()
