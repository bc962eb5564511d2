"""The life of a capture handle, asynchronous and not."""

import numpy as np
import pytest

from steer_client import (
    AsyncSteerClient,
    CaptureHandle,
    CaptureSite,
    CaptureSpec,
    InvalidRequest,
    SteerClient,
    SteeringSpec,
)
from steer_service.testing.fake_backend import decode_row
from tests.client.conftest import Server

MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "how are you today"},
]


@pytest.fixture
async def handle(client: AsyncSteerClient) -> CaptureHandle:
    _, handles = await client.generate("a b c", max_tokens=4, capture_layers=[2, 0])
    assert handles is not None
    return handles[0]


@pytest.fixture
async def chat_handle(client: AsyncSteerClient) -> CaptureHandle:
    _, handles = await client.chat(MESSAGES, max_tokens=4, capture_layers=[1])
    assert handles is not None
    await handles[0].fetch()
    return handles[0]


async def test_captures_before_fetch_say_how_to_fetch(handle: CaptureHandle) -> None:
    with pytest.raises(RuntimeError, match=r"Captures not fetched yet for request .+\. Call: await handle\.fetch\(\)"):
        _ = handle.captures


async def test_fetch_returns_the_same_data_every_time(handle: CaptureHandle) -> None:
    first = await handle.fetch()

    assert await handle.fetch() is first
    assert handle.captures is first
    assert list(first) == [2, 0] == list(handle.layer_indices)


async def test_rows_say_layer_and_position(handle: CaptureHandle) -> None:
    hidden = (await handle.fetch())[2][0]["hidden"]

    assert [decode_row(row)[:2] for row in hidden] == [(2, position) for position in range(6)]


async def test_data_stays_after_close_and_closing_twice_is_harmless(handle: CaptureHandle) -> None:
    async with handle:
        await handle.fetch()
    await handle.close()

    assert handle.captures[0][0]["hidden"].shape == (6, 8)


async def test_a_handle_holds_what_was_chosen(client: AsyncSteerClient) -> None:
    spec = SteeringSpec.simple_add(1, [1.0] * 8, positions="generated")
    capture = CaptureSpec(layers=(2, 0), site=CaptureSite.BOTH, positions=["generated", -1], dtype="float32")

    _, handles = await client.generate("a b c", max_tokens=4, steering_spec=spec, capture=capture)

    assert handles is not None
    [entry] = (await handles[0].fetch())[2]
    assert [decode_row(row)[:2] for row in entry["hidden"]] == [(2, 2), (2, 3), (2, 4), (2, 5)]
    assert entry["hidden"] is entry["after"]
    assert (entry["after"][:, 5].tolist(), entry["before"][:, 5].tolist()) == ([0] * 4, [1] * 4)
    meta = entry["meta"]
    assert meta.positions.tolist() == [2, 3, 4, 5]
    assert meta.token_ids.tolist() == [decode_row(row)[2] for row in entry["hidden"]]
    assert meta.is_generated.tolist() == meta.is_steered.tolist() == [False, True, True, True]


async def test_a_capture_of_no_rows_is_empty_and_not_missing(client: AsyncSteerClient) -> None:
    probe, _ = await client.generate("a b", max_tokens=1, raw_output=True)
    stop = probe[0].outputs[0].token_ids[0]

    _, handles = await client.generate(
        "a b", max_tokens=4, stop_token_ids=[stop], capture=CaptureSpec(layers=(1,), positions="generated")
    )

    assert handles is not None
    [entry] = (await handles[0].fetch())[1]
    assert (entry["hidden"].shape, len(entry["meta"])) == ((0, 8), 0)


async def test_layers_and_a_whole_capture_are_not_given_together(client: AsyncSteerClient) -> None:
    with pytest.raises(InvalidRequest, match="not both"):
        await client.generate("a", capture_layers=[1], capture=CaptureSpec(layers=(1,)))
    with pytest.raises(InvalidRequest, match="expected CaptureSpec"):
        await client.chat(MESSAGES, capture=[1])


async def test_a_message_that_was_not_captured_says_so(client: AsyncSteerClient) -> None:
    _, handles = await client.chat(MESSAGES, max_tokens=4, capture=CaptureSpec(layers=(1,), positions=["generated", 4]))
    assert handles is not None
    await handles[0].fetch()

    assert [decode_row(row)[1] for row in handles[0].get_message_activations(1, 1)] == [4]
    with pytest.raises(ValueError, match="no row of message 0 was captured"):
        handles[0].get_message_activations(0, 1)


async def test_no_layers_give_a_handle_without_layers(client: AsyncSteerClient) -> None:
    _, handles = await client.generate("a b c", max_tokens=2, capture_layers=[])

    assert handles is not None
    assert await handles[0].fetch() == {}


async def test_a_message_s_activations_are_its_rows(chat_handle: CaptureHandle) -> None:
    everything = chat_handle.captures[1][0]["hidden"]

    system = chat_handle.get_message_activations(0, 1)
    user = chat_handle.get_message_activations(1, 1)
    to_the_end = chat_handle.get_message_activations(1, 1, include_generated=True)

    assert chat_handle.message_boundaries is not None
    assert [boundary.num_tokens for boundary in chat_handle.message_boundaries] == [2, 4]
    np.testing.assert_array_equal(system, everything[1:3])
    np.testing.assert_array_equal(user, everything[4:8])
    np.testing.assert_array_equal(to_the_end, everything[4:])


@pytest.mark.parametrize(
    ("message_idx", "layer_idx", "said"),
    [
        (2, 1, r"message_idx 2 out of range \[0, 2\)"),
        (-1, 1, r"message_idx -1 out of range \[0, 2\)"),
        (0, 3, r"layer_idx 3 not in captured layers: \[1\]"),
    ],
)
async def test_unknown_messages_and_layers_are_refused(
    chat_handle: CaptureHandle, message_idx: int, layer_idx: int, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        chat_handle.get_message_activations(message_idx, layer_idx)


async def test_a_prompt_that_was_no_chat_has_no_messages(handle: CaptureHandle) -> None:
    await handle.fetch()

    with pytest.raises(RuntimeError, match="Message boundaries not available for this capture"):
        handle.get_message_activations(0, 2)


def test_a_handle_of_the_blocking_client_needs_no_loop(server: Server) -> None:
    with SteerClient(server.address) as client:
        _, chosen = client.chat(MESSAGES, max_tokens=4, capture=CaptureSpec(layers=(1,), positions=-1))
        assert chosen is not None
        assert chosen[0].fetch()[1][0]["meta"].positions.tolist() == [8]
        _, handles = client.chat(MESSAGES, max_tokens=4, capture_layers=[1])
        assert handles is not None

        with pytest.raises(RuntimeError, match=r"Captures not fetched yet for request .+\. Call: handle\.fetch\(\)"):
            _ = handles[0].captures
        with handles[0] as handle:
            assert handle.fetch() is handle.fetch()
            assert handle.captures[1][0]["hidden"].shape == (12, 8)
    handle.close()

    assert handle.get_message_activations(1, 1).shape == (4, 8)
    assert handle.layer_indices == (1,)
