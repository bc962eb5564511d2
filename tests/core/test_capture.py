"""Captures: what may be asked for, the labels of rows, and parts of what was captured."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.capture import (
    CaptureDelivery,
    CapturedRows,
    CaptureSite,
    CaptureSpec,
    RowLabels,
    chosen_layers,
)
from steer_service.core.errors import InvalidRequest
from steer_service.core.positions import PositionRange, PositionScope
from steer_service.core.spans import positions_of, spans_of


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


@pytest.mark.parametrize("delivery", CaptureDelivery)
def test_a_delivery_is_said_by_its_name_or_its_value(delivery: CaptureDelivery) -> None:
    assert CaptureSpec(layers=(1,)).delivery is CaptureDelivery.INLINE
    assert CaptureSpec(layers=(1,), delivery=delivery).delivery is delivery
    assert CaptureSpec(layers=(1,), delivery=delivery.value).delivery is delivery


@pytest.mark.parametrize("delivery", ["", "HELD", "shared_memory", None, 2], ids=repr)
def test_an_unknown_delivery_is_refused_with_those_that_there_are(delivery: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"is not one of inline, held, shared_memory_preferred, ") as raised:
        CaptureSpec(layers=(1,), delivery=delivery)
    assert (raised.value.field, raised.value.reason) == ("delivery", "BAD_DELIVERY")


def test_only_inline_captures_are_live() -> None:
    assert CaptureSpec(layers=(1,), is_live=True).is_live
    for delivery in set(CaptureDelivery) - {CaptureDelivery.INLINE}:
        with pytest.raises(InvalidRequest, match=f"live captures are inline, not {delivery.value}") as raised:
            CaptureSpec(layers=(1,), delivery=delivery, is_live=True)
        assert raised.value.field == "is_live"
    with pytest.raises(InvalidRequest, match="1 is not True or False") as raised:
        CaptureSpec(layers=(1,), is_live=1)
    assert raised.value.field == "is_live"


def test_a_session_token_is_bytes_and_is_not_shown() -> None:
    spec = CaptureSpec(layers=(1,), shared_memory_session=b"secret")
    assert "secret" not in repr(spec)
    with pytest.raises(InvalidRequest) as raised:
        CaptureSpec(layers=(1,), shared_memory_session="secret")
    assert raised.value.field == "shared_memory_session"
    assert "secret" not in str(raised.value)


def test_who_captures_itself_shares_its_memory() -> None:
    assert [delivery for delivery in CaptureDelivery if delivery.is_shared] == [
        CaptureDelivery.SHARED_MEMORY_PREFERRED,
        CaptureDelivery.SHARED_MEMORY_REQUIRED,
    ]
    assert CaptureDelivery.SHARED_MEMORY_PREFERRED.in_process is CaptureDelivery.SHARED_MEMORY_REQUIRED
    assert {delivery.in_process for delivery in CaptureDelivery} == set(CaptureDelivery) - {
        CaptureDelivery.SHARED_MEMORY_PREFERRED
    }


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


def test_labels_are_found_by_position() -> None:
    assert LABELS.at(((0, 1), (4, 5))) == LABELS[np.array([0, 2])]
    assert len(LABELS.at(())) == 0


SPANS = ((0, 2), (5, 8))
AFTER = {2: np.arange(10.0).reshape(5, 2), 0: -np.arange(10.0).reshape(5, 2)}
BEFORE = {layer: rows + 100 for layer, rows in AFTER.items()}
CAPTURED = CapturedRows(
    before=BEFORE,
    after=AFTER,
    spans=SPANS,
    labels=RowLabels(
        positions=[0, 1, 5, 6, 7], token_ids=[9, 8, 7, 6, 5], is_generated=[False] * 5, is_steered=[True] * 5
    ),
)


@given(st.sets(st.sampled_from([0, 1, 5, 6, 7])), st.permutations([2, 0]), st.integers(0, 2))
def test_a_part_holds_the_rows_that_were_chosen_at_both_sites(chosen: set[int], order: list[int], count: int) -> None:
    spans = spans_of(np.array(sorted(chosen), dtype=np.int32))

    part = CAPTURED.select(order[:count], spans)

    rows = [[0, 1, 5, 6, 7].index(position) for position in sorted(chosen)]
    assert list(part.before) == list(part.after) == order[:count]
    assert part.spans == spans
    assert part.labels is not None
    assert part.labels.positions.tolist() == sorted(chosen)
    for layer in part.after:
        np.testing.assert_array_equal(part.after[layer], AFTER[layer][rows])
        np.testing.assert_array_equal(part.before[layer], BEFORE[layer][rows])


def test_without_a_choice_everything_is_chosen() -> None:
    assert CAPTURED.select() == CAPTURED
    assert list(CAPTURED.select(spans=((5, 6),)).hidden) == [2, 0]


@pytest.mark.parametrize("spans", [None, SPANS, ((0, 1),), ((0, 2), (5, 6)), ((1, 2), (5, 8))], ids=repr)
def test_rows_that_lie_together_are_not_copied(spans: Any) -> None:
    part = CAPTURED.select([2], spans)
    assert np.shares_memory(part.after[2], AFTER[2])
    assert np.shares_memory(part.before[2], BEFORE[2])


def test_rows_that_lie_apart_are_copied() -> None:
    assert not np.shares_memory(CAPTURED.select([2], ((0, 1), (6, 7))).after[2], AFTER[2])


def test_a_layer_counts_once_and_keeps_its_place() -> None:
    assert list(CAPTURED.select([0, 2, 0]).hidden) == [0, 2]
    assert chosen_layers((2, 0), iter([0, 0])) == (0,)
    assert chosen_layers((2, 0), None) == (2, 0)
    assert chosen_layers((2, 0), ()) == ()


@pytest.mark.parametrize(
    ("layers", "spans", "said", "field"),
    [
        ((2, 1), None, r"layer 1 was not captured; \[0, 2\] were", "layers[1]"),
        ((2, 0, 2, -1), None, r"layer -1 was not captured", "layers[3]"),
        (None, ((1, 3),), "position 2 was not captured", "positions"),
        (None, ((0, 1), (7, 9)), "position 8 was not captured", "positions"),
        ((0,), ((900, 901),), "position 900 was not captured", "positions"),
    ],
)
def test_what_was_not_captured_is_refused_by_name(layers: Any, spans: Any, said: str, field: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as raised:
        CAPTURED.select(layers, spans)
    assert (raised.value.field, raised.value.reason) == (field, "NOT_CAPTURED")


def test_rows_of_one_site_are_the_rows() -> None:
    part = CapturedRows(before=BEFORE, spans=SPANS).select([0], ((0, 2),))
    assert part.hidden is part.before
    assert (dict(part.after), part.nbytes) == ({}, 2 * 2 * 8)


def test_labels_say_what_each_row_was() -> None:
    steered = np.array([True, False, True, False, False])
    labels = RowLabels.of(((0, 1), (2, 4)), [7, 8, 9, 10, 11], 3, steered)
    assert labels == RowLabels(
        positions=[0, 2, 3], token_ids=[7, 9, 10], is_generated=[False, False, True], is_steered=[True, True, False]
    )


def test_captures_are_equal_if_their_arrays_are() -> None:
    assert CapturedRows(after=AFTER, spans=SPANS) == CapturedRows(
        after={layer: rows.copy() for layer, rows in AFTER.items()}, spans=SPANS
    )
    assert CapturedRows(after=AFTER, spans=SPANS) != CapturedRows(before=AFTER, spans=SPANS)
    assert CapturedRows(after=AFTER, spans=SPANS) != CapturedRows(after=BEFORE, spans=SPANS)
    assert CapturedRows(after=AFTER, spans=SPANS) != CapturedRows(after=AFTER, spans=((0, 5),))
    assert positions_of(SPANS).tolist() == [0, 1, 5, 6, 7]
