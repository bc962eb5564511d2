"""Starts an engine on the deterministic model with given arguments, drives it with traffic and judges what came."""

import asyncio
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer_service.engine import VLLMSteeringModel
from steer_service.engine.worker.trace import read_trace
from tests.engine.conftest import ENGINE_ARGUMENTS
from tests.engine.deterministic_model.plugin import make_folder, plugged_in
from tests.engine.deterministic_model.traffic import Traffic
from tests.engine.deterministic_model.verdict import Answer, TraceVerdict, answer, faults_of, judge_trace

ARGUMENTS: dict[str, Any] = {
    **ENGINE_ARGUMENTS,  # of them: steps of 64 rows at most, so that prompts take several
    "load_format": "dummy",
    "steer_allow_unverified": True,
    "steer_slots": 6,  # fewer than the programs of the traffic
}

AT_ONCE = 40
"""Requests under way at once: more than vLLM's 32 sequences."""

LIMIT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Drive:
    """What came of driving an engine."""

    answers: list[Answer]
    """One per case."""
    faults: list[str]
    """Everything that was wrong."""
    trace: TraceVerdict
    """What the workers wrote down."""

    @property
    def reused(self) -> list[int]:
        """Rows from the prefix cache of each output that has any."""
        receipts = [
            end.receipt for answer in self.answers for index in answer.outputs() for end in answer.finished(index)
        ]
        return [receipt.rows_from_prefix_cache for receipt in receipts if receipt.rows_from_prefix_cache]

    @property
    def cancelled(self) -> int:
        """Cases whose caller went away."""
        return sum(not answer.is_complete for answer in self.answers)


@contextmanager
def few_threads() -> Iterator[None]:
    """Within the block, vLLM's workers share the cores instead of claiming one each: there may be more of them."""
    names = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def deterministic_engine(folder: Path, **arguments: Any) -> Iterator[VLLMSteeringModel]:
    """A running engine on the deterministic model, which writes its trace into `folder`."""
    model = folder / "model"
    if not model.exists():
        make_folder(model)
    shutil.rmtree(folder / "trace", ignore_errors=True)
    (folder / "trace").mkdir()
    chosen = {**ARGUMENTS, "steer_trace": str(folder / "trace" / "steps"), **arguments}
    with plugged_in(folder / "plugin"), few_threads(), VLLMSteeringModel(str(model), **chosen) as engine:
        yield engine


async def drive(
    model: VLLMSteeringModel,
    folder: Path,
    *,
    seed: int,
    count: int = 200,
    tensor_parallel: int = 1,
    most_tokens: int = 24,
) -> Drive:
    """Sends `count` cases, AT_ONCE at a time, and judges the answers and the trace."""
    decode = model._engine._services.llm.renderer.get_tokenizer().decode
    cases = Traffic(seed, decode, most_tokens=most_tokens).cases(count)
    room = asyncio.Semaphore(AT_ONCE)

    async def one(case: Any) -> Answer:
        async with room:
            return await answer(model, case)

    answers = await asyncio.wait_for(asyncio.gather(*[one(case) for case in cases]), LIMIT_S)
    faults = [fault for each in answers for fault in faults_of(each)]
    trace = judge_trace(list(read_trace(folder / "trace" / "steps")), answers, tensor_parallel=tensor_parallel)
    return Drive(answers=answers, faults=[*faults, *trace.faults], trace=trace)
