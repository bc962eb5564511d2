"""tokenize, detokenize and render of both clients, through a server."""

from dataclasses import replace

import pytest

from steer_client import AsyncSteerClient, EngineFailed, InvalidRequest, NotFound, SteerClient
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend
from tests.client.conftest import Serve, Server

MESSAGES = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "Well,"}]


async def test_what_is_shown_is_what_a_request_has(client: AsyncSteerClient) -> None:
    text = await client.tokenize("one  two")
    chat = await client.render(MESSAGES, continue_final_message=True)
    [generation] = (await client.generate("one  two", max_tokens=1, raw_output=True)).generations
    [answer] = (
        await client.chat(MESSAGES, max_tokens=1, continue_final_message=True, capture_layers=1, raw_output=True)
    ).generations

    assert text.token_ids == generation.prompt_token_ids
    assert (text.text, text.token_texts, text.offsets) == ("one  two", ("one", "two"), ((0, 3), (5, 8)))
    assert chat.token_ids == answer.prompt_token_ids
    assert chat.message_boundaries == answer.message_boundaries
    assert (chat.text, chat.prefill) == ("<user> one two <assistant> Well,", "Well,")


def test_the_blocking_client_shows_the_same(server: Server) -> None:
    with SteerClient(server.address) as client:
        assert client.tokenize("one two").token_texts == ("one", "two")
        assert client.detokenize([1, 2]) == " t1 t2"
        assert client.render(MESSAGES, continue_final_message=True).prefill == "Well,"
        assert client.render([1, 2]).text == " t1 t2"


async def test_texts_and_places_travel_only_if_they_are_asked_for(client: AsyncSteerClient) -> None:
    tokens = await client.tokenize("one two", with_token_texts=False, with_offsets=False)
    assert (tokens.token_texts, tokens.offsets, len(tokens.token_ids)) == (None, None, 2)


@pytest.mark.parametrize(("keep", "kept"), [(3, 3), (-1, FAKE_MODEL.max_model_len)])
async def test_token_ids_that_are_cut_may_be_more_than_a_message_has_place_for(
    client: AsyncSteerClient, keep: int, kept: int
) -> None:
    token_ids = [10**6, *(number % 30_000 for number in range(2 * FAKE_MODEL.max_model_len))]

    shown = await client.render(token_ids, truncate_prompt_tokens=keep)
    results = await client.generate([token_ids], max_tokens=0, truncate_prompt_tokens=keep, raw_output=True)

    assert shown.token_ids == results.generations[0].prompt_token_ids == tuple(token_ids[-kept:])
    with pytest.raises(InvalidRequest) as raised:
        await client.render(token_ids, truncate_prompt_tokens=FAKE_MODEL.max_model_len + 1)
    assert (raised.value.field, raised.value.reason) == ("truncate_prompt_tokens", "OUT_OF_RANGE")


@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_a_cut_prompt_has_as_many_tokens_as_an_engine_at_the_model_s_own_maximum_takes(
    serve: Serve, max_tokens: int
) -> None:
    most = FAKE_MODEL.max_model_len - 1
    server = serve(FakeBackend(replace(FAKE_MODEL, max_prompt_tokens=most)))
    token_ids = [number % 30_000 for number in range(most + 1)]
    async with AsyncSteerClient(server.address) as client:
        assert (await client.load_info()).max_prompt_tokens == most
        kept = await client.generate([token_ids], max_tokens=max_tokens, truncate_prompt_tokens=-1, raw_output=True)
        assert kept.generations[0].prompt_token_ids == tuple(token_ids[1:])
        assert (await client.render(token_ids, truncate_prompt_tokens=-1)).token_ids == tuple(token_ids[1:])
        with pytest.raises(InvalidRequest) as raised:
            await client.generate([token_ids], max_tokens=max_tokens)
    assert (raised.value.field, raised.value.reason) == ("prompt", "PROMPT_TOO_LONG")


async def test_errors_of_the_server_keep_their_type_field_and_reason(client: AsyncSteerClient) -> None:
    with pytest.raises(InvalidRequest) as raised:
        await client.detokenize([32_000])
    assert (raised.value.field, raised.value.reason) == ("token_ids", "BAD_TOKEN")
    with pytest.raises(NotFound):
        await client.render("a", model="other")


async def test_a_closed_client_shows_nothing(client: AsyncSteerClient) -> None:
    await client.close()
    with pytest.raises(EngineFailed) as raised:
        await client.tokenize("a")
    assert raised.value.reason == "CLOSED"
