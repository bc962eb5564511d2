"""Many engines one after another in one process: vLLM's `LLM` with our worker, and what the front end does by hand.

It pays vLLM's imports once and starts no process, so a tiny model takes seconds. Nothing of `VLLMEngine` is in it: it
is for tests of what happens in the worker.
"""

import gc
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_service.core.capture import CaptureSite
from steer_service.core.errors import Unsupported
from steer_service.core.span_table import SpanTable
from steer_service.core.spans import EVERYWHERE
from steer_service.core.specs import SteeringSpec
from steer_service.engine.config import SteeringConfig
from steer_service.engine.failure_counters import FailureCounters
from steer_service.engine.messages import WorkerReport, WorkerRequest
from steer_service.engine.refusals import WORKER_CLS
from steer_service.engine.region import ALIGNMENT, CAPTURED, STEERED, Region, RegionLayout
from steer_service.ops.plan import NO_SLOT
from steer_service.ops.program import compile_program, program_to_bytes
from steer_service.shm.segments import SegmentDirectory

ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 128,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 32,  # so that a prompt takes several steps
    "kv_cache_memory_bytes": 8 << 20,
    "skip_tokenizer_init": True,
    "disable_log_stats": True,
    "enable_prefix_caching": False,
}


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: its prompt, how many tokens to generate, and its steering."""

    prompt: Sequence[int]
    tokens: int
    steering: SteeringSpec | None = None
    sites: tuple[CaptureSite, ...] = (CaptureSite.AFTER,)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of it: every row of every layer, and the tokens."""

    token_ids: Sequence[int]
    """Prompt and generated tokens."""
    streams: Mapping[int, np.ndarray]
    """Layer -> rows after steering, all tokens but the last."""
    streams_before: Mapping[int, np.ndarray]
    """Likewise before steering, if asked for."""


class InProcess:
    """A running engine; the report of its one worker is in `report`."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        config = llm.llm_engine.vllm_config
        self.layers = config.model_config.get_total_num_hidden_layers()
        self._width = config.model_config.get_hidden_size()
        self._dtype = str(config.model_config.dtype).removeprefix("torch.")
        self._failure_counters = FailureCounters.create(SegmentDirectory(), 1, SteeringConfig.from_vllm(config).slots)
        marks = SegmentDirectory().create(ALIGNMENT)
        try:
            args = (self._failure_counters.name, 1, (marks.name, marks.size))
            (reply,) = llm.collective_rpc("steering_report", args=args)
        finally:
            self._failure_counters.unlink()
            marks.unlink()
        self.report = WorkerReport.from_rpc(reply)

    @property
    def worker(self) -> Any:
        """The worker itself."""
        return self.llm.llm_engine.model_executor.driver_worker.worker

    def run(self, asks: Sequence[Ask]) -> list[Answer]:
        """Answers all of them in one batch, each row steered and captured as asked; raises as `generate` does."""
        return [self._answer(ask, *answered) for ask, answered in zip(asks, self.generate(asks), strict=True)]

    def generate(self, asks: Sequence[Ask]) -> list[tuple[Any, Region]]:
        """vLLM's output for each of them, in one batch, and the region that the worker wrote to.

        Raises Unsupported if the worker refused the model.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        if self.report.refusal:
            raise Unsupported(self.report.refusal, reason=self.report.refusal_reason)
        regions = [self._region(ask) for ask in asks]
        try:
            params = [
                SamplingParams(
                    max_tokens=ask.tokens,
                    temperature=0.0,
                    ignore_eos=True,
                    detokenize=False,
                    extra_args=self._worker_request(ask, slot, region).to_extra_args(),
                )
                for slot, (ask, (_, region)) in enumerate(zip(asks, regions, strict=True))
            ]
            prompts = [TokensPrompt(prompt_token_ids=list(ask.prompt)) for ask in asks]
            outputs = self.llm.generate(prompts, params, use_tqdm=False)
            return [(output, region) for output, (_, region) in zip(outputs, regions, strict=True)]
        finally:
            for segment, _ in regions:
                segment.unlink()

    def _region(self, ask: Ask) -> tuple[Any, Region]:
        layout = RegionLayout(
            stages=1,
            rows=len(ask.prompt) + ask.tokens - 1,
            sites=ask.sites,
            layers=tuple(range(self.layers)),
            captured=SpanTable.of(EVERYWHERE),
            hidden_size=self._width,
            dtype=self._dtype,
        )
        segment = SegmentDirectory().create(layout.size)
        return segment, Region(layout, segment)

    def _worker_request(self, ask: Ask, slot: int, region: Region) -> WorkerRequest:
        digest = ""
        if ask.steering is not None:
            program = compile_program(ask.steering)
            digest = program.digest
            self.llm.collective_rpc("load_programs", args=([(slot, digest, program_to_bytes(program))],))
        return WorkerRequest(
            output="test/0",
            slot=slot if digest else NO_SLOT,
            digest=digest,
            steered=SpanTable.of(EVERYWHERE if digest else ()),
            segment=region.name,
            offset=region.offset,
            stages=1,
            rows=region.layout.rows,
            sites=region.layout.sites,
            layers=region.layout.layers,
            captured=region.layout.captured,
            dtype=region.layout.dtype,
            reusable_rows=0,
        )

    def _answer(self, ask: Ask, output: Any, region: Region) -> Answer:
        rows = region.layout.rows
        assert region.count(CAPTURED, rows) == rows
        assert region.count(STEERED, rows) == (rows if ask.steering is not None else 0)
        return Answer(
            token_ids=[*ask.prompt, *output.outputs[0].token_ids],
            streams=self._streams(region, CaptureSite.AFTER),
            streams_before=self._streams(region, CaptureSite.BEFORE) if CaptureSite.BEFORE in ask.sites else {},
        )

    def _streams(self, region: Region, site: CaptureSite) -> dict[int, np.ndarray]:
        return {layer: region.rows(site, layer).copy() for layer in range(self.layers)}


def _override_once(override_kernels: Callable[[], None]) -> None:
    """vLLM's scan of all modules for kernels trips over llvmlite's, once Numba has compiled something."""
    from vllm.triton_utils import dispatcher

    if dispatcher._registry:
        return
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("llvmlite")}
    try:
        override_kernels()
    finally:
        sys.modules.update(hidden)


@contextmanager
def in_process(
    folder: Path, *, steering: SteeringConfig | None = None, worker_cls: str = WORKER_CLS, **arguments: Any
) -> Iterator[InProcess]:
    """An engine on the model in `folder`, gone when the block ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        from vllm import LLM
        from vllm.distributed import cleanup_dist_env_and_memory
        from vllm.model_executor.models import registry
        from vllm.model_executor.models.transformers.base import Base
        from vllm.platforms import current_platform

        override_kernels = current_platform.register_triton_kernel_overrides
        patch.setattr(
            type(current_platform), "register_triton_kernel_overrides", lambda *_: _override_once(override_kernels)
        )
        # vLLM looks at each new class of models in a process of its own, which imports everything once more.
        patch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
        if {**ARGUMENTS, **arguments}["enforce_eager"]:
            # It would change the class in transformers itself, for every other test of this process.
            patch.setattr(Base, "_decorate_cls_for_torch_compile", lambda *_, **__: None)
        collect = gc.collect
        patch.setattr(gc, "collect", lambda *_: 0)  # vLLM does it eight times a start, half a second each
        llm = None
        affinity = os.sched_getaffinity(0)
        try:
            llm = LLM(
                model=str(folder),
                worker_cls=worker_cls,
                additional_config=(steering or SteeringConfig(slots=8)).to_additional_config(),
                **{**ARGUMENTS, **arguments},
            )
            yield InProcess(llm)
        finally:
            if llm is not None:
                llm.llm_engine.engine_core.shutdown()
                del llm
            cleanup_dist_env_and_memory()
            collect()
            os.sched_setaffinity(0, affinity)
