"""Captures: which layers may be asked for, and the life of a handle."""

import asyncio
import gc
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.capture import CaptureHandle, CaptureSite, CaptureSpec, MessageBoundary
from steer_service.core.errors import EngineFailed, InvalidRequest

ROWS = {2: np.arange(12.0).reshape(6, 2), 0: -np.arange(12.0).reshape(6, 2)}
CHAT = (MessageBoundary("user", "Hello", 0, 3), MessageBoundary("assistant", "Hi", 3, 5))
LIMIT_S = 5


class Source:
    """Where a handle's data comes from; counts what was asked of it."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.fetched = 0
        self.released = 0
        self.go = asyncio.Event()
        self.go.set()

    async def fetch(self) -> dict[int, Any]:
        self.fetched += 1
        await self.go.wait()
        if self.failures:
            raise self.failures.pop(0)
        return ROWS

    async def release(self) -> None:
        self.released += 1
        if self.failures:
            raise self.failures.pop(0)


def handle(source: Source, boundaries: Any = CHAT, *, held: bool = True) -> CaptureHandle:
    return CaptureHandle(
        request_id="r1",
        layer_indices=(2, 0),
        fetch=source.fetch,
        release=source.release if held else None,
        message_boundaries=boundaries,
    )


# -- what may be asked for -------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2**31 - 1), max_size=20))
def test_layers_count_once_and_keep_their_order(layers: list[int]) -> None:
    expected = tuple(layer for place, layer in enumerate(layers) if layer not in layers[:place])

    for given_layers in (layers, tuple(layers), np.array(layers, dtype=np.int64), iter(layers)):
        assert CaptureSpec(layers=given_layers).layers == expected


def test_one_layer_may_be_given_alone() -> None:
    assert CaptureSpec(layers=3).layers == (3,)
    assert CaptureSpec(layers=np.int64(3)).layers == (3,)


@pytest.mark.parametrize(
    ("layers", "field"),
    [
        ((1, -1), "layers[1]"),
        ((2**31,), "layers[0]"),
        ((1.0,), "layers[0]"),
        (("1",), "layers[0]"),
        ((True,), "layers[0]"),
        (True, "layers[0]"),
        ("12", "layers"),
        (b"12", "layers"),
        (None, "layers"),
        (1.5, "layers"),
    ],
    ids=repr,
)
def test_what_is_not_a_layer_is_refused_with_its_place(layers: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        CaptureSpec(layers=layers)
    assert raised.value.field == field


def test_a_chunk_has_bounds() -> None:
    for size in (None, 4096, 1 << 20, np.int64(8192)):
        assert CaptureSpec(layers=(), max_chunk_bytes=size).max_chunk_bytes == size
    for size in (0, 4095, (1 << 20) + 1, 8192.0, "8192", True):
        with pytest.raises(InvalidRequest, match=r"outside 4096\.\.1048576") as raised:
            CaptureSpec(layers=(), max_chunk_bytes=size)
        assert raised.value.field == "max_chunk_bytes"


def test_a_site_is_one_of_the_known() -> None:
    assert CaptureSpec(layers=(1,)).site is CaptureSite.AFTER
    with pytest.raises(InvalidRequest, match="is not a CaptureSite"):
        CaptureSpec(layers=(1,), site="after")


# -- fetching --------------------------------------------------------------------------------------------------------


async def test_rows_are_where_users_know_them() -> None:
    one = handle(Source(), held=False)

    captures = await one.fetch()

    assert captures is one.captures
    assert list(captures) == [2, 0]
    assert captures[2] == [{"hidden": ROWS[2]}]


async def test_reading_before_fetching_is_an_error_that_says_what_to_call() -> None:
    one = handle(Source(), held=False)

    with pytest.raises(RuntimeError, match=r"Captures not fetched yet for request r1\. Call: await handle\.fetch\(\)"):
        _ = one.captures
    with pytest.raises(RuntimeError, match="Captures not fetched yet"):
        one.get_message_activations(0, 2)


async def test_data_is_fetched_once() -> None:
    source = Source()
    one = handle(source, held=False)

    assert await one.fetch() is await one.fetch()
    assert source.fetched == 1


async def test_fetches_at_the_same_time_share_one_transfer() -> None:
    source = Source()
    source.go.clear()
    one = handle(source, held=False)
    both = asyncio.gather(one.fetch(), one.fetch())
    async with asyncio.timeout(LIMIT_S):
        while not source.fetched:
            await asyncio.sleep(0)

    source.go.set()

    first, second = await asyncio.wait_for(both, LIMIT_S)
    assert first is second
    assert source.fetched == 1


async def test_a_fetch_that_failed_can_be_tried_again() -> None:
    source = Source(EngineFailed("gone"))
    one = handle(source, held=False)

    with pytest.raises(EngineFailed, match="gone"):
        await one.fetch()

    assert list(await one.fetch()) == [2, 0]


# -- closing ---------------------------------------------------------------------------------------------------------


async def test_leaving_the_block_releases_once_and_keeps_the_data() -> None:
    source = Source()
    async with handle(source) as one:
        await one.fetch()
    await one.close()

    assert source.released == 1
    assert one.captures[0][0]["hidden"] is ROWS[0]


async def test_entering_the_block_does_not_fetch() -> None:
    source = Source()
    async with handle(source):
        pass

    assert (source.fetched, source.released) == (0, 1)


async def test_an_error_inside_the_block_still_releases() -> None:
    source = Source()
    with pytest.raises(KeyError):
        async with handle(source):
            raise KeyError

    assert source.released == 1


async def test_a_release_that_failed_can_be_tried_again() -> None:
    source = Source(EngineFailed("gone"))
    one = handle(source)

    with pytest.raises(EngineFailed, match="gone"):
        await one.close()
    await one.close()

    assert source.released == 2


async def test_a_handle_that_holds_memory_warns_when_it_is_lost() -> None:
    lost = [handle(Source())]

    with pytest.warns(ResourceWarning, match="captures of request r1 were never closed"):
        lost.clear()


async def test_a_handle_that_was_closed_or_holds_nothing_is_lost_in_silence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        await handle(Source()).close()
        handle(Source(), held=False)
        gc.collect()


# -- chats -----------------------------------------------------------------------------------------------------------


async def test_a_message_has_its_own_rows() -> None:
    one = handle(Source(), held=False)
    await one.fetch()

    assert CHAT[0].num_tokens == 3
    assert one.get_message_activations(0, 2).tolist() == ROWS[2][0:3].tolist()
    assert one.get_message_activations(1, 0).tolist() == ROWS[0][3:5].tolist()


async def test_only_the_last_message_can_include_what_was_generated() -> None:
    one = handle(Source(), held=False)
    await one.fetch()

    assert one.get_message_activations(1, 2, include_generated=True).tolist() == ROWS[2][3:].tolist()
    assert one.get_message_activations(0, 2, include_generated=True).tolist() == ROWS[2][0:3].tolist()


@pytest.mark.parametrize(
    ("message", "layer", "rule"),
    [
        (2, 2, r"message_idx 2 out of range \[0, 2\)"),
        (-1, 2, r"message_idx -1 out of range \[0, 2\)"),
        (0, 1, r"layer_idx 1 not in captured layers: \[2, 0\]"),
    ],
)
async def test_an_unknown_message_or_layer_is_an_error(message: int, layer: int, rule: str) -> None:
    one = handle(Source(), held=False)
    await one.fetch()

    with pytest.raises(ValueError, match=rule):
        one.get_message_activations(message, layer)


async def test_without_a_chat_there_are_no_messages() -> None:
    one = handle(Source(), boundaries=None, held=False)
    await one.fetch()

    with pytest.raises(RuntimeError, match="Message boundaries not available for this capture"):
        one.get_message_activations(0, 2)
