"""Which rows a handle gives: chosen layers and positions, both sites, and the messages of a chat."""

from typing import Any

import numpy as np
import pytest

from steer_service.core.capture import CapturedRows, MessageBoundary, RowLabels
from steer_service.core.errors import InvalidRequest
from steer_service.core.positions import PositionRange
from steer_service.runtime.handle import CaptureHandle
from tests.runtime.held_rows import CHAT, LABELS, ROWS, here


@pytest.mark.parametrize(
    ("layers", "positions", "expected"),
    [
        (None, None, [0, 1, 2, 3, 4, 5]),
        ([0], [1, range(4, 6)], [1, 4, 5]),
        ([0, 2, 0], "prompt", [0, 1, 2, 3, 4]),
        ((2,), "generated", [5]),
        (iter([2]), -1, [4]),
        (None, PositionRange(4), [4, 5]),
        ([], 0, [0]),
    ],
)
async def test_chosen_rows_come_with_their_labels_and_nothing_else_does(
    layers: Any, positions: Any, expected: list[int]
) -> None:
    one = here(labels=LABELS)
    wanted = [2, 0] if layers is None else list(dict.fromkeys(layers := list(layers)))

    rows = await one.fetch_rows(layers=layers, positions=positions)

    assert list(rows.after) == wanted
    assert all(rows.after[layer].tolist() == ROWS[layer][expected].tolist() for layer in wanted)
    assert rows.labels == LABELS[np.array(expected)]
    with pytest.raises(RuntimeError, match="not fetched yet"):
        _ = one.captures


async def test_chosen_rows_have_no_labels_if_none_came() -> None:
    assert (await here().fetch_rows(positions=[0])).labels is None


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"layers": [2, 1]}, "layers[1]"),
        ({"positions": "everywhere"}, "positions"),
        ({"positions": []}, "positions"),
        ({"positions": 6}, "positions.ranges[0]"),
        ({"positions": -6}, "positions.ranges[0]"),
    ],
    ids=str,
)
async def test_what_was_not_captured_is_refused_by_its_name(asked: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        await here().fetch_rows(**asked)
    assert raised.value.field == field


async def test_a_position_between_captured_ones_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="position 1 was not captured") as raised:
        await chosen_rows().fetch_rows(positions="prompt")
    assert (raised.value.field, raised.value.reason) == ("positions", "NOT_CAPTURED")


def chosen_rows(**fields: Any) -> CaptureHandle:
    """A handle of rows 0, 3 and 4."""
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    labels = fields.pop("labels", None)
    return here(CapturedRows(**{"after": {1: rows}, "spans": ((0, 1), (3, 5)), **fields}), labels=labels)


THREE = RowLabels(
    positions=[0, 3, 4], token_ids=[7, 8, 9], is_generated=[False, False, True], is_steered=[True, False, True]
)


async def test_both_sites_and_the_labels_stand_beside_the_rows() -> None:
    before, after = np.zeros((3, 2), np.float32), np.ones((3, 2), np.float32)
    [entry] = (await chosen_rows(before={1: before}, after={1: after}, labels=THREE).fetch())[1]

    assert list(entry) == ["hidden", "before", "after", "meta"]
    assert entry["hidden"] is entry["after"]
    assert np.shares_memory(entry["after"], after)
    assert np.shares_memory(entry["before"], before)
    assert entry["meta"] is THREE


async def test_rows_before_steering_are_the_rows_if_only_they_were_captured() -> None:
    before = np.zeros((3, 2), np.float32)
    [entry] = (await chosen_rows(before={1: before}, after={}).fetch())[1]

    assert list(entry) == ["hidden", "before"]
    assert entry["hidden"] is entry["before"]
    assert np.shares_memory(entry["before"], before)


async def test_a_message_has_its_own_rows() -> None:
    one = here()
    await one.fetch()

    assert CHAT[0].num_tokens == 3
    assert one.get_message_activations(0, 2).tolist() == ROWS[2][0:3].tolist()
    assert one.get_message_activations(1, 0).tolist() == ROWS[0][3:5].tolist()


async def test_only_the_last_message_can_include_what_was_generated() -> None:
    one = here()
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
    one = here()
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
    one = here(boundaries=None)
    await one.fetch()

    with pytest.raises(RuntimeError, match="Message boundaries not available for this capture"):
        one.get_message_activations(0, 2)
