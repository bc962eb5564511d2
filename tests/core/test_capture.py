"""Captures: which layers may be asked for, and the life of a handle."""

import asyncio
import gc
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.capture import (
    CapturedRows,
    CaptureHandle,
    CaptureSite,
    CaptureSpec,
    MessageBoundary,
    RowLabels,
)
from steer_service.core.errors import EngineFailed, InvalidRequest
from steer_service.core.positions import PositionRange, PositionScope

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

    async def fetch(self) -> CapturedRows:
        self.fetched += 1
        await self.go.wait()
        if self.failures:
            raise self.failures.pop(0)
        return CapturedRows(after=ROWS, spans=((0, 6),))

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


def test_both_sites_are_two() -> None:
    assert CaptureSite.BOTH.parts == (CaptureSite.BEFORE, CaptureSite.AFTER)
    assert CaptureSite.BEFORE.parts == (CaptureSite.BEFORE,)


def test_positions_are_said_as_in_a_spec() -> None:
    assert CaptureSpec(layers=(1,), positions=["generated", -1]).positions == PositionScope(
        generated=True, ranges=(PositionRange(-1, -1),)
    )
    for words, field in (
        ("all", "positions"),
        ([], "positions"),
        ([0, "x"], "positions"),
        ([0, 0.5], "positions.ranges[1]"),
    ):
        with pytest.raises(InvalidRequest) as raised:
            CaptureSpec(layers=(1,), positions=words)
        assert raised.value.field == field


def test_an_element_type_is_one_that_travels() -> None:
    assert CaptureSpec(layers=(1,)).dtype is None
    assert CaptureSpec(layers=(1,), dtype="torch.bfloat16").dtype == "bfloat16"
    for bad in ("float64", "", 4, np.float32):
        with pytest.raises(InvalidRequest) as raised:
            CaptureSpec(layers=(1,), dtype=bad)
        assert (raised.value.field, raised.value.reason) == ("dtype", "UNKNOWN_DTYPE")


# -- labels ----------------------------------------------------------------------------------------------------------

LABELS = RowLabels(
    positions=[0, 3, 4], token_ids=[7, 8, 9], is_generated=[False, False, True], is_steered=[True, False, True]
)


def test_labels_are_arrays_of_their_own_types() -> None:
    assert [LABELS.positions.dtype, LABELS.token_ids.dtype] == [np.int32] * 2
    assert [LABELS.is_generated.dtype, LABELS.is_steered.dtype] == [np.bool_] * 2
    assert len(LABELS) == 3


def test_labels_are_cut_and_joined() -> None:
    assert RowLabels.concatenate([LABELS[:1], LABELS[1:1], LABELS[1:]]) == LABELS
    assert LABELS[:2] != LABELS
    assert LABELS != "labels"


def test_labels_of_unlike_lengths_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="parallel arrays"):
        RowLabels(positions=[0, 1], token_ids=[7], is_generated=[False, True], is_steered=[False, True])
    with pytest.raises(InvalidRequest, match="parallel arrays"):
        RowLabels(positions=0, token_ids=1, is_generated=False, is_steered=False)


# -- fetching --------------------------------------------------------------------------------------------------------


async def test_rows_are_where_users_know_them() -> None:
    one = handle(Source(), held=False)

    captures = await one.fetch()

    assert captures is one.captures
    assert list(captures) == [2, 0]
    assert captures[2] == [{"hidden": ROWS[2], "after": ROWS[2]}]
    assert captures[2][0]["hidden"] is captures[2][0]["after"]


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


def chosen_rows(**fields: Any) -> CaptureHandle:
    """A handle of rows 0, 3 and 4."""

    async def fetch() -> CapturedRows:
        return CapturedRows(**{"after": {1: np.arange(6.0).reshape(3, 2)}, "spans": ((0, 1), (3, 5)), **fields})

    return CaptureHandle(request_id="r1", layer_indices=(1,), fetch=fetch, message_boundaries=CHAT)


async def test_both_sites_and_the_labels_stand_beside_the_rows() -> None:
    before, after = np.zeros((3, 2)), np.ones((3, 2))
    [entry] = (await chosen_rows(before={1: before}, after={1: after}, labels=LABELS).fetch())[1]

    assert list(entry) == ["hidden", "before", "after", "meta"]
    assert entry["hidden"] is entry["after"] is after
    assert entry["before"] is before
    assert entry["meta"] is LABELS


async def test_rows_before_steering_are_the_rows_if_only_they_were_captured() -> None:
    before = np.zeros((3, 2))
    [entry] = (await chosen_rows(before={1: before}, after={}).fetch())[1]

    assert list(entry) == ["hidden", "before"]
    assert entry["hidden"] is entry["before"] is before


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


async def test_a_message_has_those_of_its_rows_that_were_captured() -> None:
    one = chosen_rows(spans=((1, 2), (3, 4), (6, 7)))
    await one.fetch()

    assert one.get_message_activations(0, 1).tolist() == [[0, 1]]
    assert one.get_message_activations(1, 1).tolist() == [[2, 3]]
    assert one.get_message_activations(1, 1, include_generated=True).tolist() == [[2, 3], [4, 5]]
    assert np.shares_memory(one.get_message_activations(1, 1), one.captures[1][0]["hidden"])


async def test_a_message_of_which_nothing_was_captured_is_an_error() -> None:
    one = chosen_rows(spans=((0, 2), (6, 7)))
    await one.fetch()

    with pytest.raises(ValueError, match="no row of message 1 was captured; it has positions 3 to 4"):
        one.get_message_activations(1, 1)
    assert one.get_message_activations(1, 1, include_generated=True).tolist() == [[4, 5]]


async def test_a_message_without_tokens_has_no_rows() -> None:
    one = chosen_rows()
    one.message_boundaries = (MessageBoundary("user", "", 2, 2),)
    await one.fetch()

    assert one.get_message_activations(0, 1).shape == (0, 2)


async def test_without_a_chat_there_are_no_messages() -> None:
    one = handle(Source(), boundaries=None, held=False)
    await one.fetch()

    with pytest.raises(RuntimeError, match="Message boundaries not available for this capture"):
        one.get_message_activations(0, 2)
