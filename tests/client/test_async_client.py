"""The asynchronous client against a real server around a fake model."""

import asyncio
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from steer_client import (
    AsyncSteerClient,
    CaptureSpec,
    ChatPrompt,
    Completed,
    GenerateRequest,
    InvalidRequest,
    SamplingOptions,
    Started,
    SteeringSpec,
    TextPrompt,
    TokenPrompt,
)
from steer_service.core.arrays import dtype_from_name
from steer_service.runtime.results import collect
from steer_service.testing.fake_backend import (
    FAKE_MODEL,
    FakeBackend,
    encode_row,
    text_of,
    token_at,
)
from steer_service.testing.fake_prompts import words_to_token_ids
from tests.client.conftest import Serve, Server
from tests.shm.folders import no_more_files


def expected_text(prompt: str, count: int, index: int = 0) -> str:
    tokens = words_to_token_ids(prompt, FAKE_MODEL.vocab_size)
    return "".join(text_of(token_at(tokens, index, number, FAKE_MODEL.vocab_size)) for number in range(count))


async def test_generate_returns_the_text_of_every_prompt_in_order(client: AsyncSteerClient) -> None:
    prompts = [f"prompt number {number}" for number in range(5)]

    texts, handles = await client.generate(prompts, max_tokens=4)

    assert texts == [expected_text(prompt, 4) for prompt in prompts]
    assert handles is None


async def test_generate_returns_n_texts_and_handles_per_prompt(client: AsyncSteerClient) -> None:
    texts, handles = await client.generate(["a b", "c"], max_tokens=3, n=2, capture_layers=1)

    assert texts == [expected_text(prompt, 3, index) for prompt, index in itertools.product(["a b", "c"], range(2))]
    assert handles is not None
    assert [(await handle.fetch())[1][0]["hidden"].shape for handle in handles] == [(4, 8), (4, 8), (3, 8), (3, 8)]


async def test_no_prompts_give_no_texts(client: AsyncSteerClient) -> None:
    assert await client.generate([]) == ([], None)


async def test_a_call_on_a_connection_that_is_there_opens_no_file(client: AsyncSteerClient) -> None:
    await client.generate("a b", max_tokens=1)

    with no_more_files():
        texts, _ = await client.generate("a b", max_tokens=3)

    assert texts == [expected_text("a b", 3)]


async def test_raw_output_is_what_the_server_said(client: AsyncSteerClient, server: Server) -> None:
    spec = SteeringSpec.simple_cap(layer=2, vector=np.arange(8.0), max=1.0)

    [generation], _ = await client.generate(
        "one two", max_tokens=3, steering_spec=spec, logprobs=2, raw_output=True, seed=7
    )

    direct = await collect(FakeBackend().submit(server.backend.requests[0]))
    assert generation == direct
    assert generation.outputs[0].receipt.steering_digest == spec.digest()
    assert generation.sampling.top_p == 1.0
    assert generation.sampling.seed == 7
    assert len(generation.outputs[0].logprobs) == 3


async def test_the_request_arrives_as_it_was_written(client: AsyncSteerClient, server: Server) -> None:
    request = GenerateRequest(
        prompt=TokenPrompt(token_ids=(1, 2, 3)),
        sampling=SamplingOptions(max_tokens=2, temperature=0.0, seed=-5, stop=("x",), logit_bias={3: -1.5}),
        steering=SteeringSpec.simple_add(3, np.linspace(-1, 1, 8), scale=-0.5),
        capture=CaptureSpec(layers=(3, 0)),
        request_id="mine:1",
        model="fake",
        cache_salt="salt",
    )

    await collect(client.submit(request))

    [received] = server.backend.requests
    assert received == replace(request, client_id=received.client_id)
    assert received.client_id.startswith("client ")


async def test_submit_yields_started_first_and_completed_last(client: AsyncSteerClient) -> None:
    request = GenerateRequest(prompt=TextPrompt(text="a b"), sampling=SamplingOptions(max_tokens=2, n=2))

    events = [event async for event in client.submit(request)]

    assert isinstance(events[0], Started)
    assert [isinstance(event, Completed) for event in events] == [False] * (len(events) - 1) + [True]


async def test_stream_yields_the_text_as_it_comes(client: AsyncSteerClient) -> None:
    pieces = [piece async for piece in client.stream("a b c", max_tokens=5)]

    assert len(pieces) == 5
    assert "".join(pieces) == expected_text("a b c", 5)


async def test_chat_answers_one_conversation_or_several(client: AsyncSteerClient, server: Server) -> None:
    hello = [{"role": "user", "content": "hello"}]

    [alone], _ = await client.chat(hello, max_tokens=2)
    both, _ = await client.chat([hello, [{"role": "user", "content": "bye"}]], max_tokens=2)

    assert alone.prefill == ""
    assert [alone.generated] == [response.generated for response in both[:1]]
    assert alone.to_message() == {"role": "assistant", "content": alone.generated}
    assert isinstance(server.backend.requests[0].prompt, ChatPrompt)


async def test_chat_goes_on_with_a_prefill(client: AsyncSteerClient) -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Well,"}]

    [response], _ = await client.chat(messages, max_tokens=2, continue_final_message=True)

    assert response.prefill == "Well,"
    assert response.full_text() == "Well," + response.generated


async def test_facts_are_there_before_any_await(server: Server) -> None:
    client = AsyncSteerClient(server.address)

    assert (client.hidden_size, client.layer_count, client.model_name) == (8, 4, "fake")
    assert client.info == FAKE_MODEL
    await client.close()


async def test_connect_learns_the_model(server: Server) -> None:
    async with await AsyncSteerClient.connect(server.address) as client:
        server.stop()

        assert client.info == FAKE_MODEL


async def test_a_unix_socket_serves_as_well(serve: Serve, short_folder: str) -> None:
    server = serve(address=f"unix:{short_folder}/steer.sock")

    async with AsyncSteerClient(server.address) as client:
        texts, _ = await client.generate("a b", max_tokens=2)
        width = client.hidden_size

    assert width == 8
    assert texts == [expected_text("a b", 2)]


def test_one_client_serves_one_event_loop_after_another(server: Server) -> None:
    client = AsyncSteerClient(server.address)

    first = asyncio.run(client.generate("a b", max_tokens=2))
    second = asyncio.run(client.generate("a b", max_tokens=2))

    assert first == second == ([expected_text("a b", 2)], None)
    asyncio.run(client.close())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
async def test_captured_rows_arrive_bit_by_bit(serve: Serve, dtype: str) -> None:
    info = replace(FAKE_MODEL, dtype=dtype)
    async with AsyncSteerClient(serve(FakeBackend(info)).address) as client:
        [generation], _ = await client.generate("a b c", max_tokens=30, capture_layers=[3, 0], raw_output=True)

    output = generation.outputs[0]
    tokens = [*generation.prompt_token_ids, *output.token_ids][:-1]
    for layer in (3, 0):
        rows = [encode_row(layer, position, token, info) for position, token in enumerate(tokens)]
        assert output.captured.after[layer].dtype == dtype_from_name(dtype)
        np.testing.assert_array_equal(output.captured.after[layer], np.stack(rows))
        assert output.captures[layer].dtype == np.float32
        np.testing.assert_array_equal(output.captures[layer], np.stack(rows).astype(np.float32))
    assert output.receipt.rows_captured == len(tokens)


async def test_a_capture_larger_than_a_message_arrives_whole(serve: Serve) -> None:
    wide = replace(FAKE_MODEL, hidden_size=1 << 16)
    async with AsyncSteerClient(serve(FakeBackend(wide)).address) as client:
        [generation], _ = await client.generate("word " * 39, max_tokens=2, capture_layers=[1], raw_output=True)

    hidden = generation.outputs[0].captures[1]
    assert hidden.nbytes > 8 << 20
    assert hidden[:, 1].tolist() == list(range(40))


@pytest.mark.parametrize("layers", [-1, [0, -1], (-1,)], ids=repr)
async def test_a_negative_layer_is_explained_with_the_layers_of_the_model(server: Server, layers: Any) -> None:
    async with AsyncSteerClient(server.address) as client:
        with pytest.raises(InvalidRequest, match="this model has 4, so -1 would be 3") as raised:
            await client.generate("a", capture_layers=layers)
        with pytest.raises(InvalidRequest, match="this model has 4, so -1 would be 3"):
            await client.chat([{"role": "user", "content": "a"}], capture_layers=layers)
    assert raised.value.field == f"capture.layers[{0 if isinstance(layers, int) else len(layers) - 1}]"


async def test_without_a_server_a_negative_layer_is_explained_by_the_rule() -> None:
    async with AsyncSteerClient("127.0.0.1:1") as client:
        with pytest.raises(InvalidRequest, match="counted from the end it is layer_count - 1"):
            await client.generate("a", capture_layers=-1)
