"""An error of a worker whose output vLLM does not read fails the requests within seconds, and ends the engine."""

import asyncio
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_service.core.errors import EngineFailed, Unsupported
from steer_service.core.events import TokenDelta
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import SteeringSpec
from steer_service.engine import VLLMSteeringModel
from steer_service.runtime.results import collect
from tests.engine.closing import leaves_nothing
from tests.engine.deterministic_model import rules
from tests.engine.deterministic_model.drive import deterministic_engine
from tests.engine.deterministic_model.worker_faults import VARIABLE

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(300)]

WITHIN_S = 30.0
"""Bound for a busy machine. vLLM itself gives up after 300 s."""

TENSOR = {"tensor_parallel_size": 2}
PIPELINE = {"pipeline_parallel_size": 2, "enforce_eager": False}
REPLICAS = {"data_parallel_size": 2}


def ask(*, max_tokens: int, scale: float | None) -> GenerateRequest:
    return GenerateRequest(
        prompt=TokenPrompt(token_ids=range(100, 110)),
        sampling=SamplingOptions(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
        steering=None if scale is None else SteeringSpec.simple_add(1, np.ones(rules.WIDTH), scale),
    )


async def run(model: VLLMSteeringModel, request: GenerateRequest, began: asyncio.Event) -> None:
    """Runs a request that has no end in time."""
    async with aclosing(model.submit(request)) as events:
        async for event in events:
            if isinstance(event, TokenDelta):
                began.set()


async def fails(model: VLLMSteeringModel, request: GenerateRequest, began: asyncio.Event) -> str:
    """The message of the error that ends the request."""
    with pytest.raises(EngineFailed) as raised:
        await run(model, request, began)
    assert raised.value.reason == "ENGINE_DIED"
    return raised.value.message


@pytest.mark.parametrize(
    ("arguments", "worker", "kind", "fault"),
    [
        pytest.param(TENSOR, 1, "layer", "ZeroDivisionError", id="tensor-layer"),
        pytest.param(PIPELINE, 0, "layer", "ZeroDivisionError", id="pipeline-layer", marks=pytest.mark.extended),
        pytest.param(TENSOR, 1, "bank", "WRONG_PROGRAM", id="tensor-bank", marks=pytest.mark.extended),
        pytest.param(TENSOR, 1, "plan", "ZeroDivisionError", id="tensor-plan", marks=pytest.mark.extended),
        pytest.param(TENSOR, 1, "end", "ZeroDivisionError", id="tensor-end", marks=pytest.mark.extended),
        pytest.param(TENSOR, 0, "layer", "ZeroDivisionError", id="tensor-first", marks=pytest.mark.extended),
        pytest.param(PIPELINE, 0, "end", "ZeroDivisionError", id="pipeline-end", marks=pytest.mark.extended),
        pytest.param(PIPELINE, 1, "layer", "ZeroDivisionError", id="pipeline-last", marks=pytest.mark.extended),
        pytest.param(REPLICAS, 1, "layer", "ZeroDivisionError", id="replica-layer", marks=pytest.mark.extended),
    ],
)
async def test_a_fault_of_a_worker_fails_all_requests_within_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], worker: int, kind: str, fault: str
) -> None:
    armed = tmp_path / "fault"
    monkeypatch.setenv(VARIABLE, str(armed))
    with leaves_nothing(), deterministic_engine(tmp_path, max_model_len=1000, **arguments) as model:
        assert (await collect(model.submit(ask(max_tokens=4, scale=1.0)))).outputs[0].receipt.rows_steered == 13
        began = [asyncio.Event() for _ in range(4)]
        requests = [ask(max_tokens=900, scale=scale) for scale in (1.0, 2.0, 3.0, None)]
        running = [asyncio.create_task(fails(model, *pair)) for pair in zip(requests, began, strict=True)]
        await asyncio.wait_for(asyncio.gather(*(one.wait() for one in began)), WITHIN_S)
        assert model.is_alive

        armed.write_text(f"{worker} {kind}")
        start = time.monotonic()
        messages = await asyncio.wait_for(asyncio.gather(*running), WITHIN_S)
        print(f"failed within {time.monotonic() - start:.2f} s")

        expected = f"worker {worker} of the engine is out of order ({fault}); requests in flight are lost"
        assert messages == [expected] * 4
        assert not model.is_alive
        with pytest.raises(EngineFailed, match="out of order"):
            await collect(model.submit(ask(max_tokens=4, scale=None)))


@pytest.mark.parametrize(
    ("arguments", "worker", "kind", "finding"),
    [
        pytest.param(TENSOR, 1, "stream", r"after layer 0, .* is not the same on the tensor-parallel ranks 0 and 1"),
        pytest.param(TENSOR, 1, "kernel", "made by a test: kernel", marks=pytest.mark.extended),
        pytest.param(PIPELINE, 0, "kernel", "made by a test: kernel", marks=pytest.mark.extended),
    ],
)
def test_what_one_rank_finds_at_start_is_refused_by_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], worker: int, kind: str, finding: str
) -> None:
    armed = tmp_path / "fault"
    armed.write_text(f"{worker} {kind}")
    monkeypatch.setenv(VARIABLE, str(armed))
    with leaves_nothing(), pytest.raises(Unsupported, match=finding) as raised:
        with deterministic_engine(tmp_path, **arguments):
            pass
    assert raised.value.reason == "TAP_SELF_TEST_FAILED"
