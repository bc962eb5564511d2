"""Positions by message, role and without special tokens, through a server around the fake backend."""

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from steer_client import AsyncSteerClient, CaptureDelivery, CaptureSpec, InvalidRequest, SteeringSpec, Unsupported
from steer_service.core.spans import positions_of
from steer_service.runtime.results import Generation
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend
from steer_service.testing.fake_prompts import words_to_token_ids
from tests.client.conftest import Serve

MESSAGES = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]
"""<user> one two <assistant> three <assistant>: its messages are at 1 and 2, and at 4."""
SPECIAL = words_to_token_ids("<assistant>", FAKE_MODEL.vocab_size)
"""Special are the tokens at 3 and 5."""


@pytest.fixture
async def client(serve: Serve) -> AsyncIterator[AsyncSteerClient]:
    server = serve(FakeBackend(replace(FAKE_MODEL, special_token_ids=SPECIAL)))
    async with AsyncSteerClient(server.address) as client:
        yield client


async def chat(client: AsyncSteerClient, **options: Any) -> Generation:
    [generation] = (await client.chat(MESSAGES, max_tokens=2, raw_output=True, **options)).generations
    return generation


@pytest.mark.parametrize(
    ("positions", "rows"),
    [
        ("messages[0]", [1, 2]),
        ("messages[-1]", [4]),
        ("roles[user]", [1, 2]),
        (["roles[user]", "roles[assistant]", 0], [0, 1, 2, 4]),
        ("skip_special_tokens", [0, 1, 2, 4, 6]),
        (["prompt", "skip_special_tokens"], [0, 1, 2, 4]),
        (["messages[1]", "generated"], [4, 6]),
    ],
)
async def test_they_choose_the_rows_of_a_capture_and_of_steering(
    client: AsyncSteerClient, positions: Any, rows: list[int]
) -> None:
    capture = CaptureSpec(layers=(1,), positions=positions)
    steering = SteeringSpec.simple_add(1, [1.0] * 8, positions=positions)
    generation = await chat(client, capture=capture, steering_spec=steering)

    [output] = generation.outputs
    assert output.labels is not None
    assert output.labels.positions.tolist() == rows
    assert output.labels.is_steered.all()
    assert output.receipt.rows_steered == len(rows)
    assert positions_of(output.captured.spans).tolist() == rows


async def test_steering_by_message_needs_no_capture(client: AsyncSteerClient) -> None:
    generation = await chat(client, steering_spec=SteeringSpec.simple_add(1, [1.0] * 8, positions="messages[0]"))
    assert generation.outputs[0].receipt.rows_steered == 2
    assert len(generation.message_boundaries) == 2


async def test_a_message_that_the_chat_does_not_have_is_refused_with_their_number(client: AsyncSteerClient) -> None:
    with pytest.raises(InvalidRequest, match=r"the chat has 2, 0\.\.1 or -2\.\.-1") as raised:
        await chat(client, capture=CaptureSpec(layers=(1,), positions="messages[2]"))
    assert (raised.value.field, raised.value.reason) == ("capture.positions.messages[0]", "OUT_OF_RANGE")


async def test_a_text_has_no_messages(client: AsyncSteerClient) -> None:
    with pytest.raises(InvalidRequest) as raised:
        await client.generate("a b", steering_spec=SteeringSpec.simple_add(1, [1.0] * 8, positions="roles[user]"))
    assert (raised.value.field, raised.value.reason) == ("steering.positions.roles[0]", "NO_MESSAGES")


async def test_a_model_without_known_special_tokens_skips_none(serve: Serve) -> None:
    async with AsyncSteerClient(serve().address) as client:
        with pytest.raises(Unsupported) as raised:
            await chat(client, capture=CaptureSpec(layers=(1,), positions="skip_special_tokens"))
    assert raised.value.field == "capture.positions.skip_special_tokens"
    assert raised.value.reason == "NO_SPECIAL_TOKENS"


async def test_a_fetch_takes_positions_as_numbers(client: AsyncSteerClient) -> None:
    capture = CaptureSpec(layers=(1,), positions="messages[0]", delivery=CaptureDelivery.HELD)
    _, handles = await client.chat(MESSAGES, max_tokens=2, capture=capture)
    async with handles[0] as handle:
        assert (await handle.fetch_rows(positions=[1, 2])).hidden[1].shape == (2, 8)
        with pytest.raises(Unsupported) as raised:
            await handle.fetch_rows(positions="messages[0]")
    assert (raised.value.field, raised.value.reason) == ("positions", "UNRESOLVED_POSITIONS")


async def test_scores_of_answers_take_positions_as_numbers(client: AsyncSteerClient) -> None:
    with pytest.raises(Unsupported) as raised:
        await client.score(
            "a b", [[1]], steering_spec=SteeringSpec.simple_add(1, [1.0] * 8, positions="skip_special_tokens")
        )
    assert (raised.value.field, raised.value.reason) == ("steering.positions", "UNRESOLVED_POSITIONS")
