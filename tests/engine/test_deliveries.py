"""Captures that stay where they are, and captures that come with their tokens, on real vLLM in this process."""

import asyncio
import gc
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from steer_service.core.capture import CaptureDelivery, CaptureSite, CaptureSpec, Pooling
from steer_service.core.errors import InvalidRequest, NotFound, OverBudget
from steer_service.core.events import CaptureBlock, CaptureHeld, CaptureLabels, Event, OutputFinished, TokenDelta
from steer_service.core.positions import PositionRange
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.spans import positions_of
from steer_service.core.specs import AddSpec, LayerSteeringSpec, SteeringSpec
from steer_service.core.stored_capture import in_order
from steer_service.engine import VLLMSteeringModel
from steer_service.runtime.local_capture import LocalCapture
from steer_service.runtime.pooling import pooled
from steer_service.runtime.results import collect
from tests.engine.conftest import own_segments
from tests.tiny_models import LAYERS, WIDTH

pytestmark = pytest.mark.engine

PROMPT = 70
MAX_TOKENS = 6
HELD = [CaptureDelivery.HELD, CaptureDelivery.SHARED_MEMORY_PREFERRED, CaptureDelivery.SHARED_MEMORY_REQUIRED]
CAPTURE = CaptureSpec(layers=(2, 0), site=CaptureSite.BOTH, positions=[PositionRange(3, 9), PositionRange(-2, None)])


def ask(capture: CaptureSpec, **sampling: object) -> GenerateRequest:
    options = {"max_tokens": MAX_TOKENS, "temperature": 0.0, "ignore_eos": True, **sampling}
    add = AddSpec(np.random.default_rng(5).normal(size=WIDTH), 2.0)
    return GenerateRequest(
        prompt=TokenPrompt(token_ids=range(5000, 5000 + PROMPT)),
        steering=SteeringSpec(
            {1: LayerSteeringSpec([add]), 2: LayerSteeringSpec([add])}, positions=PositionRange(5, None)
        ),
        capture=capture,
        sampling=SamplingOptions(**options),
    )


async def events_of(model: VLLMSteeringModel, request: GenerateRequest) -> list[Event]:
    return [event async for event in model.submit(request)]


async def inline_rows(model: VLLMSteeringModel, capture: CaptureSpec = CAPTURE) -> dict[tuple[int, CaptureSite], bytes]:
    generation = await collect(model.submit(ask(capture)))
    return {(layer, site): rows.tobytes() for layer, site, rows in in_order(generation.outputs[0].captured)}


@pytest.mark.parametrize("delivery", HELD)
async def test_held_rows_are_those_that_come_inline(llama: VLLMSteeringModel, delivery: CaptureDelivery) -> None:
    want = await inline_rows(llama)
    before = own_segments()
    generation = await collect(llama.submit(ask(replace(CAPTURE, delivery=delivery))))
    held = generation.outputs[0].held
    rows = await held.rows()
    assert {(layer, site): array.tobytes() for layer, site, array in in_order(rows)} == want
    assert len(own_segments() - before) == 1
    await held.release()
    assert own_segments() == before
    assert {(layer, site): array.tobytes() for layer, site, array in in_order(rows)} == want  # seen once, they stay
    with pytest.raises(NotFound):
        await held.rows()
    assert generation.outputs[0].receipt.bytes_captured == held.metadata.total_bytes


async def test_the_place_of_shared_rows_leads_to_them(llama: VLLMSteeringModel) -> None:
    want = await inline_rows(llama)
    generation = await collect(llama.submit(ask(replace(CAPTURE, delivery=CaptureDelivery.SHARED_MEMORY_REQUIRED))))
    held = generation.outputs[0].held
    assert isinstance(held, LocalCapture)
    data = (Path("/dev/shm") / held.segment.name).read_bytes()
    assert len(data) == held.segment.size
    for key, offset in held.segment.offsets.items():
        assert offset % 64 == 0
        assert data[offset : offset + len(want[key])] == want[key]
    await held.release()


async def test_the_handle_reads_parts_and_lets_go(llama: VLLMSteeringModel) -> None:
    before = own_segments()
    capture = replace(CAPTURE, delivery=CaptureDelivery.HELD)
    prompt = [TokenPrompt(token_ids=range(5000, 5000 + PROMPT))]
    _, handles = await llama.generate(prompt, max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True, capture=capture)
    async with handles[0] as handle:
        part = await handle.fetch_rows(layers=[2], positions=[4, 8])
        captures = await handle.fetch()
    assert part.after.keys() == part.before.keys() == {2}
    assert part.labels.positions.tolist() == [4, 8]
    positions = handle.captures[2][0]["meta"].positions.tolist()
    assert positions == [*range(3, 10), PROMPT - 2, PROMPT - 1, *range(PROMPT, PROMPT + MAX_TOKENS - 1)]
    assert (part.after[2] == captures[2][0]["after"][[1, 5]]).all()
    assert own_segments() == before


async def test_a_dropped_response_frees_its_held_captures(llama: VLLMSteeringModel) -> None:
    before = own_segments()
    events = await events_of(llama, ask(replace(CAPTURE, delivery=CaptureDelivery.HELD)))
    assert len(own_segments() - before) == 1
    del events
    gc.collect()
    assert own_segments() == before


async def test_each_of_n_outputs_is_held_on_its_own(llama: VLLMSteeringModel) -> None:
    capture = CaptureSpec(layers=(1,), delivery=CaptureDelivery.HELD)
    request = ask(capture, n=3, temperature=1.0, seed=3)
    generation = await collect(llama.submit(request))
    inline = await collect(
        llama.submit(ask(replace(capture, delivery=CaptureDelivery.INLINE), n=3, temperature=1.0, seed=3))
    )
    for mine, theirs in zip(generation.outputs, inline.outputs, strict=True):
        assert mine.token_ids == theirs.token_ids
        assert (await mine.held.rows()).after[1].tobytes() == theirs.captured.after[1].tobytes()
        await mine.held.release()


@pytest.mark.parametrize("delivery", ["inline", "held", "shared_memory_required"])
@pytest.mark.parametrize("pooling", [Pooling.MEAN, Pooling.LAST, Pooling.MAX])
async def test_pooled_rows_are_those_of_several_steps_and_of_the_answer(
    llama: VLLMSteeringModel, delivery: str, pooling: Pooling
) -> None:
    """The prompt takes two steps, and its beginning may come from the prefix cache; each output has its own rows."""
    before = own_segments()
    capture = CaptureSpec(layers=(2, 0), site=CaptureSite.BOTH, positions=[PositionRange(40, -1), "generated"])
    options = {"n": 2, "temperature": 1.0, "seed": 3}
    whole, pooled_ones = [
        await collect(llama.submit(ask(one, **options)))
        for one in (capture, replace(capture, pooling=pooling, delivery=delivery))
    ]
    assert pooled_ones.usage.cached_tokens > 0  # of the request before
    for want, got in zip(whole.outputs, pooled_ones.outputs, strict=True):
        rows = got.captured if got.held is None else await got.held.rows()
        assert (rows.spans, rows.pooling) == (want.captured.spans, pooling)
        for layer, site, array in in_order(rows):
            unpooled = (want.captured.before if site is CaptureSite.BEFORE else want.captured.after)[layer]
            assert np.array_equal(array, pooled(unpooled, pooling))
        assert got.receipt.rows_captured == PROMPT - 40 + MAX_TOKENS - 1
        if got.held is not None:
            assert isinstance(got.held, LocalCapture)
            assert got.held.segment.size < 2 * 2 * (WIDTH + 64) * 4
            await got.held.release()
    assert own_segments() == before


async def test_a_caller_who_leaves_a_pooled_capture_leaves_nothing(llama: VLLMSteeringModel) -> None:
    before = own_segments()
    capture = replace(CAPTURE, pooling=Pooling.MEAN, delivery=CaptureDelivery.HELD)
    async with aclosing(llama.submit(ask(capture, max_tokens=200))) as events:
        async for event in events:
            if isinstance(event, TokenDelta):
                break
    assert own_segments() == before


async def test_live_rows_come_with_their_tokens_and_labels(llama: VLLMSteeringModel) -> None:
    capture = CaptureSpec(layers=tuple(range(LAYERS)), is_live=True)
    events = await events_of(llama, ask(capture))
    rows = tokens = labelled = 0
    for event in events:
        match event:
            case TokenDelta():
                assert rows == (PROMPT + tokens - 1 if tokens else 0)  # all rows of the tokens before have come
                tokens += len(event.token_ids)
            case CaptureLabels():
                assert event.labels.positions.tolist() == list(range(labelled, PROMPT + tokens - 1))
                labelled += len(event.labels)
            case CaptureBlock():
                assert positions_of(event.spans).tolist() == list(range(rows, labelled))
                rows = labelled if event.layer == LAYERS - 1 else rows
            case OutputFinished():
                assert rows == labelled == PROMPT + MAX_TOKENS - 1
    assert tokens == MAX_TOKENS


async def test_live_rows_are_those_that_come_at_the_end(llama: VLLMSteeringModel) -> None:
    assert await inline_rows(llama, replace(CAPTURE, is_live=True)) == await inline_rows(llama)


async def test_a_caller_who_leaves_in_the_middle_leaves_nothing(llama: VLLMSteeringModel) -> None:
    before = own_segments()
    for capture in (replace(CAPTURE, is_live=True), replace(CAPTURE, delivery=CaptureDelivery.HELD)):
        async with aclosing(llama.submit(ask(capture, max_tokens=100))) as events:
            async for event in events:
                if isinstance(event, TokenDelta):
                    break
    gc.collect()
    assert own_segments() == before


async def test_a_failing_prompt_frees_the_captures_of_the_others(llama: VLLMSteeringModel) -> None:
    before = own_segments()
    prompts = [TokenPrompt(token_ids=(1, 2, 3)), TokenPrompt(token_ids=(10**6,))]
    with pytest.raises(InvalidRequest):
        await llama.generate(prompts, max_tokens=2, capture=CaptureSpec(layers=(0,), delivery=CaptureDelivery.HELD))
    gc.collect()
    assert own_segments() == before


async def test_one_owner_cannot_hold_more_than_a_share(
    llama: VLLMSteeringModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held memory counts for the client that holds it, and others go on."""
    pool = llama._engine._services.regions.segments
    request = replace(ask(replace(CAPTURE, delivery=CaptureDelivery.HELD)), client_id="a")
    first = await collect(llama.submit(request))
    monkeypatch.setattr(pool, "client_budget_bytes", pool.client_bytes("a") + 1000)
    with pytest.raises(OverBudget, match="of this client's left") as refused:
        await collect(llama.submit(request))
    assert refused.value.retry_after_s is not None
    other = await collect(llama.submit(replace(request, client_id="b")))
    await asyncio.gather(first.outputs[0].held.release(), other.outputs[0].held.release())
    again = await collect(llama.submit(request))
    await again.outputs[0].held.release()
    assert pool.client_bytes("a") == 0


def test_the_synchronous_call_fetches_and_frees(llama: VLLMSteeringModel) -> None:
    before = own_segments()
    _, handles = llama.generate_sync(
        ["The sea"], max_tokens=2, capture=CaptureSpec(layers=(1,), delivery=CaptureDelivery.SHARED_MEMORY_REQUIRED)
    )
    assert np.isfinite(handles[0].captures[1][0]["hidden"]).all()
    assert own_segments() == before


async def test_a_held_event_is_its_receivers(llama: VLLMSteeringModel) -> None:
    """The iterator may be closed behind it: what was handed over stays."""
    async with aclosing(llama.submit(ask(replace(CAPTURE, delivery=CaptureDelivery.HELD)))) as events:
        async for event in events:
            if isinstance(event, CaptureHeld):
                held = event.held
                break
    assert (await held.rows()).after[2].shape[1] == WIDTH
    await held.release()
