"""Requests that generate nothing (max_tokens=0) on transformers and through a client and a server."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from steer_client import AsyncSteerClient
from steer_service.core.capture import CaptureDelivery, CaptureSite, CaptureSpec
from steer_service.core.errors import InvalidRequest
from steer_service.core.events import FinishReason
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import SteeringSpec
from steer_service.hf.model import HFSteeringModel
from steer_service.runtime.calls import checked_events
from steer_service.runtime.results import Generation, collect
from steer_service.server.app import SteerServer
from steer_service.server.config import ServerConfig
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend
from tests.engine.oracle import Oracle, relative_error
from tests.tiny_models import WIDTH, ModelFolder

PROMPT = TokenPrompt(token_ids=tuple(range(500, 509)))
NOTHING = SamplingOptions(max_tokens=0)
BOTH = CaptureSpec(layers=(1, 3), site=CaptureSite.BOTH)
SPEC = SteeringSpec.simple_add(1, np.random.default_rng(1).normal(size=WIDTH), 2.0)


async def run(backend: object, request: GenerateRequest) -> Generation:
    return await asyncio.wait_for(collect(checked_events(backend, request)), 120)  # type: ignore[arg-type]


@pytest.mark.parametrize("is_live", [False, True])
async def test_every_row_of_the_prompt_is_steered_and_captured(
    hf: HFSteeringModel, model_folder: ModelFolder, is_live: bool
) -> None:
    request = GenerateRequest(prompt=PROMPT, sampling=NOTHING, steering=SPEC, capture=replace(BOTH, is_live=is_live))
    generation = await run(hf, request)

    [output] = generation.outputs
    assert (output.token_ids, output.text, output.finish_reason) == ([], "", FinishReason.LENGTH)
    assert (output.receipt.rows_total, output.receipt.rows_steered, output.receipt.rows_captured) == (9, 9, 9)
    assert generation.usage.completion_tokens == 0
    oracle = Oracle(model_folder("llama"))
    want = oracle.streams(list(PROMPT.token_ids), SPEC, prompt_tokens=9, before=False)
    for layer in BOTH.layers:
        assert relative_error(output.captured.after[layer], want[layer]) <= 1e-5


async def test_it_runs_beside_requests_that_generate(hf: HFSteeringModel) -> None:
    asked = [replace(NOTHING, n=2), SamplingOptions(max_tokens=3, temperature=0.0), NOTHING]
    together = await asyncio.gather(
        *[run(hf, GenerateRequest(prompt=PROMPT, sampling=sampling, capture=BOTH)) for sampling in asked]
    )

    assert [[len(output.token_ids) for output in one.outputs] for one in together] == [[0, 0], [3], [0]]


@pytest.mark.parametrize("delivery", [CaptureDelivery.INLINE, CaptureDelivery.HELD])
async def test_a_client_gets_the_rows_in_every_delivery(delivery: CaptureDelivery) -> None:
    backend = FakeBackend()
    server = SteerServer(ServerConfig(address="127.0.0.1:0"))
    address = await server.listen()
    await server.open(backend)
    try:
        async with AsyncSteerClient(address) as client:
            capture = CaptureSpec(layers=(0,), delivery=delivery)
            [generation], [handle] = await client.generate(
                TokenPrompt(token_ids=(5,) * FAKE_MODEL.max_model_len), max_tokens=0, capture=capture, raw_output=True
            )
            async with handle:
                rows = await handle.fetch_rows(positions=[0, -1])
    finally:
        await server.drain()

    assert generation.outputs[0].finish_reason is FinishReason.LENGTH
    assert rows.hidden[0].shape == (2, FAKE_MODEL.hidden_size)


async def test_an_output_whose_time_is_over_first_has_no_row() -> None:
    async def never(_: int) -> None:
        await asyncio.Event().wait()

    backend = FakeBackend()
    backend.step = never
    request = GenerateRequest(prompt=PROMPT, sampling=NOTHING, capture=CaptureSpec(layers=(0,)), time_budget_s=1e-3)
    generation = await run(backend, request)

    assert generation.outputs[0].finish_reason is FinishReason.TIME_BUDGET
    assert generation.outputs[0].receipt.rows_total == 0


async def test_tokens_at_least_and_generated_positions_are_refused(hf: HFSteeringModel) -> None:
    with pytest.raises(InvalidRequest, match="min_tokens 1 is greater than max_tokens 0"):
        replace(NOTHING, min_tokens=1)
    capture = CaptureSpec(layers=(0,), positions="generated")
    with pytest.raises(InvalidRequest) as raised:
        await run(hf, GenerateRequest(prompt=PROMPT, sampling=NOTHING, capture=capture))
    assert (raised.value.reason, raised.value.field) == ("EMPTY_POSITIONS", "capture.positions.generated")
