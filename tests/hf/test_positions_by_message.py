"""Positions by message, by role and without special tokens on transformers: the rows are those of the numbers."""

import asyncio

import numpy as np
import pytest

from steer_service.core.capture import CaptureSpec
from steer_service.core.errors import InvalidRequest, Unsupported
from steer_service.core.positions import Positions
from steer_service.core.prompt import ChatMessage, ChatPrompt, TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.spans import positions_of
from steer_service.core.specs import AddSpec, LayerSteeringSpec, SteeringSpec
from steer_service.hf.model import HFSteeringModel
from steer_service.runtime.calls import checked_events
from steer_service.runtime.results import Generation, collect
from tests.tiny_models import WIDTH

CHAT = ChatPrompt(
    messages=[
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content="Where is the harbour?"),
        ChatMessage(role="assistant", content="By the sea."),
        ChatMessage(role="user", content="Which one?"),
    ]
)
VECTOR = np.random.default_rng(1).normal(size=WIDTH)


async def run(hf: HFSteeringModel, positions: Positions, prompt: ChatPrompt | TokenPrompt = CHAT) -> Generation:
    operation = AddSpec(VECTOR, 2.0, positions=positions)
    request = GenerateRequest(
        prompt=prompt,
        sampling=SamplingOptions(max_tokens=3, temperature=0.0, ignore_eos=True),
        steering=SteeringSpec({1: LayerSteeringSpec([operation])}),
        capture=CaptureSpec(layers=(2,), positions=positions),
    )
    return await asyncio.wait_for(collect(checked_events(hf, request)), 120)


@pytest.mark.parametrize(
    "positions",
    ["messages[0]", "messages[-1]", "roles[user]", "skip_special_tokens", ["prompt", "skip_special_tokens"]],
    ids=str,
)
async def test_they_are_the_tokens_that_render_shows(hf: HFSteeringModel, positions: Positions) -> None:
    shown = await hf.render(CHAT)
    special, messages = set(shown.special_positions), shown.message_boundaries
    assert special
    chosen = {
        "messages[0]": [0],
        "messages[-1]": [3],
        "roles[user]": [1, 3],
    }.get(str(positions))
    rows = range(len(shown.token_ids) + (2 if positions == "skip_special_tokens" else 0))
    if chosen is None:
        wanted = [row for row in rows if row not in special]
    else:
        spans = [range(messages[index].start_token, messages[index].end_token) for index in chosen]
        wanted = [row for span in spans for row in span]

    named, numbered = await run(hf, positions), await run(hf, wanted)

    [mine], [other] = named.outputs, numbered.outputs
    assert positions_of(mine.captured.spans).tolist() == wanted
    assert mine.receipt.rows_steered == other.receipt.rows_steered == len(wanted)
    assert np.array_equal(mine.captured.after[2], other.captured.after[2])
    assert mine.token_ids == other.token_ids


async def test_tokens_have_special_ones_but_no_messages(hf: HFSteeringModel) -> None:
    tokens = TokenPrompt(token_ids=(await hf.render(CHAT)).token_ids)
    plain = await run(hf, "skip_special_tokens", tokens)
    assert (
        plain.outputs[0].receipt.rows_steered == (await run(hf, "skip_special_tokens")).outputs[0].receipt.rows_steered
    )
    with pytest.raises(InvalidRequest) as raised:
        await run(hf, "messages[0]", tokens)
    assert raised.value.reason == "NO_MESSAGES"


async def test_a_template_that_merges_messages_is_named_as_the_reason(hf: HFSteeringModel) -> None:
    merging = "{{ messages[0].content + ' ' + messages[0].content }}"
    with HFSteeringModel(hf.model, tokenizer=hf.tokenizer, chat_template=merging) as model:
        with pytest.raises(Unsupported, match="template") as raised:
            await run(model, "roles[user]")
    assert raised.value.reason == "MESSAGE_BOUNDARIES"
    assert raised.value.field == "steering.layers[1].operations[0].positions.roles[0]"
