"""Records real steps of vLLM's V1 runner: python -m tests.engine.recorded.record [scenario ...]

Each request's tokens, prompt and generated, come from a range of their own, so that what the model was really fed says
whose each row is. That, with the positions that the runner computed, is the truth that the adapters are compared with.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.engine.recorded.steps import FOLDER, Recording, Step

RANGE = 1000
"""Tokens that each request may use."""

ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "block_size": 32,
    "kv_cache_memory_bytes": 64 << 20,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
}


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a scenario."""

    step: int
    """Steps run before it arrives."""
    prompt: int
    """Tokens of its prompt."""
    answer: int
    """Tokens it generates."""
    like: int | None = None
    """Number of an earlier request, finished by then, whose prompt it repeats."""


@dataclass(frozen=True, slots=True)
class Scenario:
    arrivals: list[Arrival]
    engine: dict[str, Any] = field(default_factory=dict)


SCENARIOS = {
    "chunked_prefill": Scenario([Arrival(0, 150, 4), Arrival(0, 40, 4)]),
    "mixed": Scenario([Arrival(0, 10, 12), Arrival(3, 100, 3), Arrival(5, 20, 6), Arrival(5, 7, 2)]),
    "finishes": Scenario(
        [Arrival(0, 5, 2), Arrival(0, 6, 9), Arrival(0, 7, 3), Arrival(0, 8, 8), Arrival(0, 9, 4), Arrival(6, 30, 5)]
    ),
    "prefix_hit": Scenario([Arrival(0, 100, 3), Arrival(0, 12, 12), Arrival(7, 100, 3, like=0)]),
    "preemption": Scenario(
        [Arrival(0, 50, 25), Arrival(0, 55, 25), Arrival(0, 60, 25)],
        {"num_gpu_blocks_override": 9, "max_model_len": 128},
    ),
    "speculative": Scenario(
        [Arrival(0, 20, 12), Arrival(2, 30, 12), Arrival(4, 70, 4)],
        {
            "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2},
            "async_scheduling": False,  # else positions of the schedule are an upper bound
        },
    ),
}


class Recorder:
    """Stands between a runner and its `_prepare_inputs` and writes down every step."""

    def __init__(self, runner: Any) -> None:
        self.steps: list[Step] = []
        self._runner = runner
        self._prepare_inputs = runner._prepare_inputs
        self._names: dict[str, str] = {}
        self._owners: dict[int, str] = {}
        runner._prepare_inputs = self._record

    def _record(self, schedule: Any, num_scheduled_tokens: Any) -> Any:
        prepared = self._prepare_inputs(schedule, num_scheduled_tokens)
        for new in schedule.scheduled_new_reqs:
            self._names[new.req_id] = f"r{len(self._names)}"
            self._owners[new.prompt_token_ids[0] // RANGE] = self._names[new.req_id]
        batch, total = self._runner.input_batch, int(num_scheduled_tokens.sum())
        cached = schedule.scheduled_cached_reqs
        self.steps.append(
            Step(
                scheduled={self._names[name]: count for name, count in schedule.num_scheduled_tokens.items()},
                new=[self._names[new.req_id] for new in schedule.scheduled_new_reqs],
                resumed=self._sorted(cached.resumed_req_ids),
                preempted=self._sorted(schedule.preempted_req_ids or ()),
                finished=self._sorted(schedule.finished_req_ids),
                drafts={self._names[n]: len(tokens) for n, tokens in schedule.scheduled_spec_decode_tokens.items()},
                req_ids=[self._names[name] for name in batch.req_ids],
                num_scheduled_tokens=num_scheduled_tokens.tolist(),
                num_computed_tokens_cpu=batch.num_computed_tokens_cpu.tolist(),
                fed=list(
                    self._fed(self._runner.input_ids.gpu[:total].tolist(), self._runner.positions[:total].tolist())
                ),
            )
        )
        return prepared

    def _sorted(self, request_ids: Any) -> list[str]:
        return sorted(self._names[name] for name in request_ids if name in self._names)

    def _fed(self, token_ids: list[int], positions: list[int]) -> Iterator[tuple[str, int, int]]:
        for client_id, rows in groupby(range(len(token_ids)), key=lambda row: self._owners[token_ids[row] // RANGE]):
            own = [positions[row] for row in rows]
            assert own == list(range(own[0], own[0] + len(own))), f"{client_id}: positions {own}"
            yield client_id, len(own), own[0]


def record(scenario: Scenario, model: Path) -> list[Step]:
    from vllm import LLMEngine, SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.inputs import TokensPrompt

    engine = LLMEngine.from_engine_args(EngineArgs(model=str(model), **{**ENGINE, **scenario.engine}))
    recorder = Recorder(engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner)
    waiting = list(enumerate(scenario.arrivals))
    while waiting or engine.has_unfinished_requests():
        while waiting and waiting[0][1].step <= len(recorder.steps):
            number, arrival = waiting.pop(0)
            start = RANGE * (1 + (number if arrival.like is None else arrival.like))
            params = SamplingParams(
                max_tokens=arrival.answer,
                ignore_eos=True,
                temperature=0.0,
                allowed_token_ids=list(range(start, start + RANGE)),
            )
            tokens = [start + position % 5 for position in range(arrival.prompt)]  # repeats, for the n-gram drafter
            engine.add_request(str(number), TokensPrompt(prompt_token_ids=tokens), params)
        engine.step()
    return recorder.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenario", nargs="*", default=list(SCENARIOS))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the runner is then in this process
    import vllm

    from tests.tiny_models import CONFIGS, make_model

    with tempfile.TemporaryDirectory() as folder:
        make_model(CONFIGS["llama"], Path(folder))
        for name in parser.parse_args().scenario:
            steps = record(SCENARIOS[name], Path(folder))
            recording = Recording(vllm=vllm.__version__, runner="V1", steps=steps)
            (FOLDER / f"{name}.json").write_text(recording.to_json())
            print(f"{name}: {len(steps)} steps")


if __name__ == "__main__":
    main()
