"""Rows that lie somewhere until they are released: what is known of them, and who frees them when."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from steer_service.core.capture import CapturedRows, CaptureSite
from steer_service.core.errors import InvalidRequest, NotFound
from steer_service.core.positions import PositionRange, scope_from
from steer_service.core.stored_capture import CaptureMetadata, in_order, resolved, unknown_capture
from steer_service.runtime.local_capture import LocalCapture, metadata_of

ROWS = np.arange(20, dtype=np.float32).reshape(5, 4)
CAPTURED = CapturedRows(before={7: ROWS + 1, 3: ROWS + 2}, after={7: ROWS + 3, 3: ROWS + 4}, spans=((0, 2), (4, 7)))
FACTS = CaptureMetadata(
    layers=(7, 3),
    sites=(CaptureSite.BEFORE, CaptureSite.AFTER),
    spans=((0, 2), (4, 7)),
    dtype="float32",
    hidden_size=4,
    prompt_tokens=6,
    sequence_rows=7,
)


def test_facts_count_rows_and_bytes() -> None:
    assert FACTS.row_count == 5
    assert FACTS.total_bytes == CAPTURED.nbytes == 2 * 2 * 5 * 4 * 4
    assert FACTS.bytes_of((3, 3), ((4, 6),)) == 2 * 2 * 4 * 4
    assert FACTS.bytes_of((), FACTS.spans) == FACTS.bytes_of((3,), ()) == 0


def test_facts_are_read_off_rows_that_are_here() -> None:
    assert metadata_of(CAPTURED, (7, 3), prompt_tokens=6, sequence_rows=7) == FACTS
    half = CapturedRows(before={1: np.zeros((0, 9), np.float16)})
    assert metadata_of(half, (1,), prompt_tokens=2, sequence_rows=3) == CaptureMetadata(
        layers=(1,),
        sites=(CaptureSite.BEFORE,),
        spans=(),
        dtype="float16",
        hidden_size=9,
        prompt_tokens=2,
        sequence_rows=3,
    )
    assert metadata_of(CapturedRows(), (), prompt_tokens=2, sequence_rows=3).total_bytes == 0


def test_rows_are_in_the_order_in_which_they_are_delivered() -> None:
    order = in_order(CAPTURED)

    assert [(layer, site) for layer, site, _ in order] == [
        (7, CaptureSite.BEFORE),
        (7, CaptureSite.AFTER),
        (3, CaptureSite.BEFORE),
        (3, CaptureSite.AFTER),
    ]
    assert [int(rows[0, 0]) for _, _, rows in order] == [1, 3, 2, 4]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (None, None),
        ("prompt", ((0, 6),)),
        ("generated", ((6, 7),)),
        (-1, ((5, 6),)),
        (PositionRange(4), ((4, 7),)),
        ([0, 6], ((0, 1), (6, 7))),
    ],
)
def test_positions_mean_those_of_the_whole_sequence(words: Any, expected: Any) -> None:
    assert resolved(FACTS, scope_from(words)) == expected


@pytest.mark.parametrize("words", [7, -7, [0, 9]])
def test_positions_beyond_the_sequence_are_refused(words: Any) -> None:
    with pytest.raises(InvalidRequest) as raised:
        resolved(FACTS, scope_from(words))
    assert (raised.value.reason, raised.value.field.partition("[")[0]) == ("OUT_OF_RANGE", "positions.ranges")


async def test_of_an_output_that_stopped_at_its_first_token_no_row_is_generated() -> None:
    metadata = replace(FACTS, prompt_tokens=7)

    rows = await LocalCapture(metadata, CAPTURED).rows([3], scope_from("generated"))

    assert rows.spans == ()
    assert [array.shape for array in (rows.before[3], rows.after[3])] == [(0, 4), (0, 4)]
    assert resolved(metadata, scope_from(["generated", 4])) == ((4, 5),)


@pytest.mark.parametrize("words", ["generated", PositionRange(4), 8])
async def test_rows_of_the_sequence_that_were_not_captured_are_missing_and_not_left_out(words: Any) -> None:
    lent = LocalCapture(replace(FACTS, sequence_rows=9), CAPTURED)

    with pytest.raises(InvalidRequest, match=f"position {8 if words == 8 else 7} was not captured") as raised:
        await lent.rows(None, scope_from(words))
    assert (raised.value.reason, raised.value.field) == ("NOT_CAPTURED", "positions")


class Memory:
    """Counts how often it was freed."""

    freed = 0

    def free(self) -> None:
        self.freed += 1

    def lent(self) -> LocalCapture:
        return LocalCapture(FACTS, CAPTURED, release=self.free)


async def test_rows_are_views_of_the_memory() -> None:
    memory = Memory()
    lent = memory.lent()

    everything = await lent.rows()
    part = await lent.rows([3], scope_from([4, 5]))

    assert everything == CAPTURED
    assert np.shares_memory(everything.after[7], CAPTURED.after[7])
    assert part == CapturedRows(before={3: CAPTURED.before[3][2:4]}, after={3: CAPTURED.after[3][2:4]}, spans=((4, 6),))
    assert np.shares_memory(part.after[3], CAPTURED.after[3])
    assert memory.freed == 0
    await lent.release()


async def test_memory_is_freed_once_whoever_asks() -> None:
    memory = Memory()
    lent = memory.lent()

    await lent.release()
    await lent.release()
    lent.release_nowait()
    del lent

    assert memory.freed == 1


async def test_memory_that_nobody_holds_any_more_is_freed() -> None:
    memory = Memory()

    lent = memory.lent()
    del lent

    assert memory.freed == 1


async def test_rows_that_were_read_outlive_the_release_and_others_cannot_be_read() -> None:
    lent = Memory().lent()
    rows = await lent.rows([7])
    await lent.release()

    assert rows.after[7].tolist() == (ROWS + 3).tolist()
    with pytest.raises(NotFound) as raised:
        await lent.rows()
    assert str(raised.value) == str(unknown_capture())


async def test_rows_that_belong_to_nobody_are_never_released() -> None:
    own = LocalCapture(FACTS, CAPTURED)

    await own.release()

    assert not own.holds_memory
    assert await own.rows() == CAPTURED


async def test_progress_is_told_once_as_nothing_travels() -> None:
    said: list[tuple[int, int]] = []

    await LocalCapture(FACTS, CAPTURED).rows([3], progress=lambda *numbers: said.append(numbers))

    assert said == [(160, 160)]


async def test_what_was_not_captured_is_refused() -> None:
    lent = Memory().lent()
    with pytest.raises(InvalidRequest, match="layer 4 was not captured"):
        await lent.rows([4])
    with pytest.raises(InvalidRequest, match="position 2 was not captured"):
        await lent.rows(None, scope_from("prompt"))
