"""Time budgets through transformers, the engine, and a client and a server around the engine."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import pytest

from steer_service.core.capture import CaptureDelivery, CaptureSite, CaptureSpec
from steer_service.core.events import FinishReason, TokenDelta
from steer_service.core.prompt import TextPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import SteeringSpec
from steer_service.engine import VLLMSteeringModel
from steer_service.runtime.calls import SteeringCalls, checked_events
from steer_service.runtime.results import Generation
from tests.engine.all_backends import BACKENDS, TEXT, AllBackends, all_backends_on, run, same_receipt
from tests.tiny_models import ModelFolder

pytestmark = pytest.mark.engine

TOKENS = 400
"""Tokens that take a while, even on a tiny model."""
ATTEMPTS = 20
"""How often a budget is tried until it ends in the middle of an output; it is doubled or halved after each."""


@pytest.fixture(scope="module")
def all_backends(llama: VLLMSteeringModel, model_folder: ModelFolder) -> Iterator[AllBackends]:
    with all_backends_on("llama", model_folder, "float32", llama) as all_backends:
        yield all_backends


def request_for(all_backends: AllBackends, **fields: object) -> GenerateRequest:
    direction = np.random.default_rng(1).normal(size=all_backends.hf.hidden_size)
    given = {
        "prompt": TextPrompt(text=TEXT),
        "sampling": SamplingOptions(max_tokens=TOKENS, temperature=0.0, ignore_eos=True),
        "steering": SteeringSpec.simple_add(1, direction, 0.5),
        "capture": CaptureSpec(layers=(0, 2), site=CaptureSite.BOTH),
    }
    return GenerateRequest(**{**given, **fields})


async def ended_in_the_middle(backend: SteeringCalls, request: GenerateRequest, full_s: float) -> Generation:
    """What a budget left of a request that takes about `full_s` seconds."""
    budget_s = full_s / 4
    for _ in range(ATTEMPTS):
        generation = await run(backend, replace(request, time_budget_s=budget_s))
        count = len(generation.outputs[0].token_ids)
        if 0 < count < TOKENS:
            return generation
        budget_s *= 0.5 if count else 2
    pytest.fail(f"no budget ended in the middle of {TOKENS} tokens")


async def timed(backend: SteeringCalls, request: GenerateRequest) -> tuple[Generation, float]:
    begin = time.monotonic()
    return await run(backend, request), time.monotonic() - begin


@pytest.mark.parametrize("interval", [None, 0], ids=["each token", "one piece"])
async def test_a_budget_keeps_the_tokens_and_rows_until_its_end(
    all_backends: AllBackends, interval: int | None
) -> None:
    request = request_for(all_backends, stream_interval=interval)
    async with all_backends.backends() as backends:
        for name, backend in backends.items():
            full, full_s = await timed(backend, request)
            generation = await ended_in_the_middle(backend, request, full_s)

            [part], [whole] = generation.outputs, full.outputs
            count = len(part.token_ids)
            rows = len(generation.prompt_token_ids) + count - 1
            assert part.finish_reason is FinishReason.TIME_BUDGET, name
            assert part.token_ids == whole.token_ids[:count], name
            assert whole.text.startswith(part.text.rstrip("\ufffd")), name
            receipt = part.receipt
            assert (receipt.rows_total, receipt.rows_steered, receipt.rows_captured) == (rows,) * 3, name
            for mine, theirs in ((part.captured.before, whole.captured.before), (part.captures, whole.captures)):
                for layer in (0, 2):
                    np.testing.assert_allclose(mine[layer], theirs[layer][:rows], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("delivery", [CaptureDelivery.INLINE, CaptureDelivery.HELD])
async def test_all_backends_end_alike_without_a_token(all_backends: AllBackends, delivery: CaptureDelivery) -> None:
    capture = CaptureSpec(layers=(0, 2), delivery=delivery)
    request = request_for(all_backends, capture=capture, time_budget_s=1e-6)
    async with all_backends.backends() as backends:
        answers = {name: await run(backend, request) for name, backend in backends.items()}
        for name in BACKENDS:
            [output] = answers[name].outputs
            assert (output.finish_reason, output.token_ids, output.text) == (FinishReason.TIME_BUDGET, [], ""), name
            assert output.receipt.rows_total == 0, name
            same_receipt(output.receipt, answers["hf"].outputs[0].receipt, name)
            if output.held is not None:
                assert (await output.held.rows()).hidden[2].shape == (0, all_backends.hf.hidden_size), name
                await output.held.release()


async def test_an_engine_aborts_what_is_over_and_serves_others_as_before(
    all_backends: AllBackends,
) -> None:
    engine = all_backends.engine
    plain = request_for(all_backends, sampling=SamplingOptions(max_tokens=8, temperature=0.0), capture=None)
    alone = await run(engine, plain)

    late = request_for(all_backends, sampling=SamplingOptions(max_tokens=TOKENS, n=8), time_budget_s=0.05)
    generations = await asyncio.gather(*(run(engine, late) for _ in range(4)), run(engine, plain))

    assert {output.finish_reason for one in generations[:-1] for output in one.outputs} == {FinishReason.TIME_BUDGET}
    assert generations[-1].outputs[0].token_ids == alone.outputs[0].token_ids


async def test_the_wait_for_a_slot_counts(all_backends: AllBackends) -> None:
    engine = all_backends.engine  # its bank has 8 slots

    def steered_by(seed: int, **fields: object) -> GenerateRequest:
        direction = np.random.default_rng(seed).normal(size=engine.hidden_size)
        return request_for(all_backends, steering=SteeringSpec.simple_add(1, direction, 0.5), **fields)

    async def first_token(seed: int) -> None:
        async for event in events[seed]:
            if isinstance(event, TokenDelta):
                return

    events = {seed: checked_events(engine, steered_by(seed)) for seed in range(2, 10)}
    await asyncio.gather(*map(first_token, events))
    waiting = await run(engine, steered_by(11, time_budget_s=0.02))
    for one in events.values():
        async with aclosing(one):
            pass

    [output] = waiting.outputs
    assert (output.finish_reason, output.token_ids) == (FinishReason.TIME_BUDGET, [])
    assert (await run(engine, steered_by(11, sampling=SamplingOptions(max_tokens=2)))).outputs[0].receipt.rows_steered
