"""Requests that wait for a slot on real vLLM: they hold no memory and stop nobody whose program is loaded."""

import asyncio
from contextlib import AsyncExitStack, aclosing

import numpy as np
import pytest

from steer_service.core.capture import CaptureDelivery, CaptureSpec
from steer_service.core.errors import OverBudget
from steer_service.core.events import Completed, TokenDelta
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import SteeringSpec
from steer_service.engine import VLLMSteeringModel
from steer_service.runtime.results import collect
from tests.engine.conftest import ENGINE_ARGUMENTS
from tests.tiny_models import WIDTH

pytestmark = pytest.mark.engine

LIMIT_S = 60.0
SLOTS = ENGINE_ARGUMENTS["steer_slots"]


def ask(number: int, *, max_tokens: int = 4, n: int = 1, capture: CaptureSpec | None = None) -> GenerateRequest:
    """A request under a program that no other number gives."""
    return GenerateRequest(
        prompt=TokenPrompt(token_ids=range(5000, 5010)),
        sampling=SamplingOptions(max_tokens=max_tokens, n=n, temperature=0.0, ignore_eos=True),
        steering=SteeringSpec.simple_add(1, np.ones(WIDTH), 1.0 + number),
        capture=capture,
    )


async def run_until_token(model: VLLMSteeringModel, request: GenerateRequest, stack: AsyncExitStack) -> None:
    """Starts a request, which runs until `stack` is closed."""
    events = await stack.enter_async_context(aclosing(model.submit(request)))
    async for event in events:
        if isinstance(event, TokenDelta):
            return


async def test_a_request_that_waits_for_a_slot_holds_no_memory_and_stops_nobody(llama: VLLMSteeringModel) -> None:
    services = llama._engine._services
    capture = CaptureSpec(layers=(0, 1), delivery=CaptureDelivery.HELD)
    async with asyncio.timeout(LIMIT_S), AsyncExitStack() as running:
        for number in range(SLOTS):
            await run_until_token(llama, ask(number, max_tokens=400), running)
        await run_until_token(llama, ask(1, max_tokens=400), running)
        before = services.regions.segments.reserved_bytes
        waiting = asyncio.create_task(collect(llama.submit(ask(99, n=3, capture=capture))))
        while not services.slots.waiting:
            await asyncio.sleep(0.01)

        assert services.regions.segments.reserved_bytes == before
        generation = await collect(llama.submit(ask(1)))  # a ninth program waits; this one is in the bank
        assert generation.outputs[0].receipt.rows_steered == 13
        assert not waiting.done()

        await running.aclose()
        generation = await waiting
        assert [output.receipt.rows_steered for output in generation.outputs] == [13, 13, 13]
        generation.release_nowait()


async def test_a_client_that_fills_the_capture_memory_does_not_stop_steering(
    llama: VLLMSteeringModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments = llama._engine._services.regions.segments
    capture = CaptureSpec(layers=(0, 1), delivery=CaptureDelivery.HELD)
    monkeypatch.setattr(segments, "budget_bytes", segments.reserved_bytes + (16 << 10))
    held = await collect(llama.submit(ask(1, capture=capture)))
    with pytest.raises(OverBudget):
        await collect(llama.submit(ask(2, capture=capture)))

    steered = [await collect(llama.submit(ask(number, n=2))) for number in range(3)]

    assert [output.receipt.rows_steered for one in steered for output in one.outputs] == [13] * 6
    held.release_nowait()


async def test_unsteered_requests_never_wait_for_a_slot(llama: VLLMSteeringModel) -> None:
    async with asyncio.timeout(LIMIT_S), AsyncExitStack() as running:
        for number in range(SLOTS):
            await run_until_token(llama, ask(number, max_tokens=400), running)
        waiting = asyncio.create_task(collect(llama.submit(ask(99))))
        while not llama._engine._services.slots.waiting:
            await asyncio.sleep(0.01)

        unsteered = GenerateRequest(
            prompt=TokenPrompt(token_ids=range(5000, 5010)), sampling=SamplingOptions(max_tokens=4)
        )
        assert [event async for event in llama.submit(unsteered) if isinstance(event, Completed)]
        assert not waiting.done()
        await running.aclose()
        await waiting


async def test_outputs_that_never_fit_together_are_refused_at_once_and_without_a_retry(
    llama: VLLMSteeringModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = CaptureSpec(layers=(0, 1), delivery=CaptureDelivery.HELD)
    monkeypatch.setattr(llama._engine._services.regions.segments, "budget_bytes", 16 << 10)
    (await collect(llama.submit(ask(1, capture=capture)))).release_nowait()

    with pytest.raises(OverBudget) as raised:
        await collect(llama.submit(ask(1, n=3, capture=capture)))

    assert (raised.value.reason, raised.value.retry_after_s) == ("SHM_SPACE", None)
