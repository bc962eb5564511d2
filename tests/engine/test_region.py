"""Regions: marks and rows lie apart, a row's place depends on what it is only, and no mark is undone."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.arrays import DTYPES
from steer_service.core.capture import CaptureSite
from steer_service.core.span_table import SpanTable
from steer_service.core.spans import EVERYWHERE, OPEN_END, Spans
from steer_service.engine.region import ALIGNMENT, CAPTURED, NON_FINITE, STEERED, Region, RegionLayout
from steer_service.shm.segments import SegmentDirectory

BEFORE, AFTER = CaptureSite.BEFORE, CaptureSite.AFTER

LAYOUTS = st.builds(
    RegionLayout,
    stages=st.integers(1, 4),
    rows=st.integers(1, 300),
    sites=st.sampled_from([(), (AFTER,), (BEFORE,), (BEFORE, AFTER)]),
    layers=st.lists(st.integers(0, 30), unique=True, max_size=4).map(tuple),
    captured=st.sampled_from([EVERYWHERE, (), ((0, 1),), ((2, 5), (100, 400)), ((7, OPEN_END),)]),
    hidden_size=st.integers(1, 65),
    dtype=st.sampled_from(list(DTYPES)),
    reported=st.lists(st.integers(0, 30), unique=True, max_size=3).map(tuple),
)


def layout(
    *,
    stages: int = 1,
    rows: int = 10,
    sites: tuple[CaptureSite, ...] = (AFTER,),
    layers: tuple[int, ...] = (),
    captured: Spans = EVERYWHERE,
    dtype: str = "float32",
) -> RegionLayout:
    return RegionLayout(
        stages=stages,
        rows=rows,
        sites=sites,
        layers=layers,
        captured=SpanTable.of(captured),
        hidden_size=6,
        dtype=dtype,
    )


def region(tmp_path: Path, of: RegionLayout) -> Region:
    return Region(of, SegmentDirectory(path=tmp_path).create(of.size))


def flags(*values: int) -> np.ndarray:
    return np.array(values, np.uint8)


@given(LAYOUTS)
def test_marks_and_arrays_do_not_overlap_and_every_array_begins_aligned(of: RegionLayout) -> None:
    assert of.data_offset % ALIGNMENT == of.array_bytes % ALIGNMENT == 0
    assert 0 <= of.data_offset - of.stages * of.rows < ALIGNMENT
    assert 0 <= of.array_bytes - of.captured_rows * of.hidden_size * DTYPES[of.dtype].itemsize < ALIGNMENT
    offsets = [of.offset(site, layer) for site in of.sites for layer in of.layers]
    assert offsets == [of.data_offset + number * of.array_bytes for number in range(len(offsets))]
    assert of.changes_offset == of.data_offset + len(offsets) * of.array_bytes
    assert of.size == of.changes_offset + len(of.reported) * of.rows * 8


@given(LAYOUTS)
def test_the_arrays_are_in_the_region_and_do_not_overlap(of: RegionLayout) -> None:
    class Memory:  # stands in for a segment: a property test makes too many to put each in a file
        name = "steerllm-none"
        memory = bytearray(of.size)

    made = Region(of, Memory)  # type: ignore[arg-type]
    made.marks_ST[:] = 255
    arrays = [made.rows(site, layer) for site in of.sites for layer in of.layers]
    for array in arrays:
        assert array.shape == (of.captured_rows, of.hidden_size)
        assert array.dtype == DTYPES[of.dtype]
    changes = [made.changes(layer) for layer in of.reported]
    for array in (*arrays, *changes):
        assert not array.view(np.uint8).any()
        array.view(np.uint8)[:] = 255

    assert made.marks_ST.shape == (of.stages, of.rows)
    assert all(array.shape == (of.rows, 2) for array in changes)
    used = of.stages * of.rows + sum(array.nbytes for array in (*arrays, *changes))
    assert bytes(Memory.memory).count(255) == used


def test_rows_begin_aligned_in_memory(tmp_path: Path) -> None:
    made = region(tmp_path, layout(rows=7, layers=(3, 4)))

    assert made.rows(AFTER, 3).ctypes.data % ALIGNMENT == made.rows(AFTER, 4).ctypes.data % ALIGNMENT == 0


def test_the_place_gives_the_offset_of_each_array_in_the_segment(tmp_path: Path) -> None:
    made = region(tmp_path, layout(rows=7, sites=(BEFORE, AFTER), layers=(3, 4)))
    made.rows(BEFORE, 4)[:] = 1.0

    place = made.place
    data = (tmp_path / place.name).read_bytes()

    assert place.size == len(data)
    assert set(place.offsets) == {(layer, site) for layer in (3, 4) for site in (BEFORE, AFTER)}
    found = np.frombuffer(data, np.float32, 7 * 6, place.offsets[4, BEFORE])
    assert (found == 1.0).all()
    assert not np.frombuffer(data, np.float32, 7 * 6, place.offsets[3, AFTER]).any()


def test_the_rows_that_were_captured_are_the_first_ones(tmp_path: Path) -> None:
    made = region(tmp_path, layout(rows=7, layers=(3,), captured=((2, OPEN_END),)))
    made.rows(AFTER, 3)[:] = np.arange(5)[:, None]

    captured = made.captured(((2, 5),))

    assert captured.after[3][:, 0].tolist() == [0, 1, 2]
    assert captured.before == {}


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_address_is_that_of_the_layers_first_row(tmp_path: Path, dtype: str) -> None:
    of = layout(sites=(BEFORE, AFTER), layers=(5, 2), dtype=dtype)
    mine = region(tmp_path, of)
    theirs = Region(of, SegmentDirectory(path=tmp_path).open(mine.name, of.size))
    row = np.arange(6).astype(DTYPES[dtype])

    after_L = theirs.addresses(AFTER, 8, frozenset(range(8)))
    before_L = theirs.addresses(BEFORE, 8, frozenset(range(8)))
    ctypes.memmove(int(after_L[2]), row.tobytes(), row.nbytes)
    ctypes.memmove(int(before_L[5]) + 3 * row.nbytes, row.tobytes(), row.nbytes)

    assert mine.rows(AFTER, 2)[0].tolist() == row.tolist()
    assert mine.rows(BEFORE, 5)[3].tolist() == row.tolist()
    arrays = [mine.rows(site, layer) for site in of.sites for layer in of.layers]
    written = sum(np.count_nonzero(array.astype(np.float32)) for array in arrays)
    assert written == 2 * np.count_nonzero(row.astype(np.float32))


def test_rows_that_are_not_captured_or_not_held_have_no_address(tmp_path: Path) -> None:
    made = region(tmp_path, layout(layers=(1, 2, 6)))

    after_L = made.addresses(AFTER, 8, frozenset({0, 1, 2, 3}))

    assert np.flatnonzero(after_L).tolist() == [1, 2]
    assert after_L.dtype == np.int64
    assert not made.addresses(BEFORE, 8, frozenset(range(8))).any()


def test_a_region_holds_the_chosen_rows_only(tmp_path: Path) -> None:
    made = region(tmp_path, layout(layers=(1,), captured=((2, 4), (8, OPEN_END))))

    assert made.rows(AFTER, 1).shape == (4, 6)


def test_a_region_without_layers_has_marks_only(tmp_path: Path) -> None:
    made = region(tmp_path, layout(rows=5))

    made.mark(0, 0, flags(STEERED))

    assert made.place.offsets == {}
    assert not made.addresses(AFTER, 8, frozenset(range(8))).any()
    assert made.count(STEERED, 5) == 1


@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12), st.lists(st.integers(0, 7), max_size=6)), max_size=12),
    st.integers(0, 10),
    st.integers(0, 10),
)
def test_marks_count_as_if_each_were_a_set_of_bits(
    stages: int, marks: list[tuple[int, int, list[int]]], start: int, rows: int
) -> None:
    class Memory:
        name = "steerllm-none"
        memory = bytearray(layout(stages=stages).size)

    made = Region(layout(stages=stages), Memory)  # type: ignore[arg-type]
    bits = [[0] * 10 for _ in range(stages)]
    for stage, first, values in marks:
        made.mark(stage % stages, first, flags(*values))
        for position, value in enumerate(values, first):
            if position < 10:
                bits[stage % stages][position] |= value

    assert made.marks_ST.tolist() == bits
    for bit in (STEERED, CAPTURED, NON_FINITE):
        assert made.count(bit, rows) == sum(all(stage[i] & bit for stage in bits) for i in range(rows))
    bad = [i for i in range(start, rows) if any(stage[i] & NON_FINITE for stage in bits)]
    assert made.first_non_finite(start, rows) == (bad[0] if bad else None)


def test_a_mark_is_not_undone_when_a_row_is_recomputed(tmp_path: Path) -> None:
    made = region(tmp_path, layout(rows=4))
    made.mark(0, 0, flags(STEERED, NON_FINITE, STEERED, 0))

    made.mark(0, 0, flags(CAPTURED, STEERED, 0, 0))

    assert made.marks_ST.tolist() == [[STEERED | CAPTURED, STEERED | NON_FINITE, STEERED, 0]]


def test_a_row_counts_when_every_stage_has_marked_it(tmp_path: Path) -> None:
    made = region(tmp_path, layout(stages=2, rows=4))

    made.mark(0, 0, flags(STEERED, STEERED, STEERED, STEERED))
    made.mark(1, 1, flags(STEERED, CAPTURED))

    assert made.count(STEERED, 4) == 1


def test_rows_beyond_those_asked_about_do_not_count(tmp_path: Path) -> None:
    made = region(tmp_path, layout(rows=4))
    made.mark(0, 0, flags(CAPTURED, CAPTURED, CAPTURED, CAPTURED))

    assert [made.count(CAPTURED, rows) for rows in range(5)] == [0, 1, 2, 3, 4]


def test_rows_beyond_the_region_are_dropped(tmp_path: Path) -> None:
    made = region(tmp_path, layout(stages=2, rows=4))

    made.mark(0, 3, flags(STEERED, STEERED))
    made.mark(0, 4, flags(STEERED))
    made.mark(0, 100, flags(STEERED))

    assert made.marks_ST.tolist() == [[0, 0, 0, STEERED], [0, 0, 0, 0]]


def test_one_stage_is_enough_to_make_a_row_non_finite(tmp_path: Path) -> None:
    made = region(tmp_path, layout(stages=2, rows=5))
    made.mark(0, 0, flags(STEERED, STEERED, STEERED, STEERED))
    made.mark(1, 0, flags(STEERED, STEERED, NON_FINITE, NON_FINITE))

    assert made.first_non_finite(0, 5) == 2
    assert made.first_non_finite(3, 5) == 3
    assert made.first_non_finite(0, 2) is None
    assert made.first_non_finite(5, 5) is None


def test_both_sides_see_the_same_marks(tmp_path: Path) -> None:
    of = layout(rows=4)
    mine = region(tmp_path, of)

    Region(of, SegmentDirectory(path=tmp_path).open(mine.name, of.size)).mark(0, 1, flags(STEERED))

    assert mine.count(STEERED, 4) == 1
