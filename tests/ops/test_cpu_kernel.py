"""The 16-bit floats of the CPU kernel, which it makes of their bits; test_rows.py has what it does with rows."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_service.core.arrays import OVERFLOWS_AT, dtype_from_name
from steer_service.ops.cpu_kernel import narrow_bfloat16, narrow_float16, widen_bfloat16, widen_float16

HALVES = {
    "bfloat16": (dtype_from_name("bfloat16"), widen_bfloat16, narrow_bfloat16),
    "float16": (dtype_from_name("float16"), widen_float16, narrow_float16),
}


def narrowed(numbers: npt.NDArray[np.float32], half: str) -> npt.NDArray[np.uint16]:
    return np.array([HALVES[half][2](number) for number in numbers], np.uint16)


def narrowed_by_numpy(numbers: npt.NDArray[np.float32], half: str) -> npt.NDArray[np.uint16]:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return numbers.astype(HALVES[half][0]).view(np.uint16)


@pytest.mark.parametrize("half", HALVES)
def test_all_65536_numbers_are_widened_as_numpy_does_and_come_back(half: str) -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    dtype, widen, _ = HALVES[half]
    got = np.array([widen(pattern) for pattern in patterns], np.float32)
    want = patterns.view(dtype).astype(np.float32)
    is_nan = np.isnan(want)

    assert np.array_equal(np.isnan(got), is_nan)
    assert np.array_equal(got[~is_nan].view(np.uint32), want[~is_nan].view(np.uint32))
    assert np.array_equal(narrowed(got, half)[~is_nan], patterns[~is_nan])
    assert np.isnan(narrowed(got, half)[is_nan].view(dtype).astype(np.float32)).all()


@pytest.mark.parametrize("half", HALVES)
def test_every_tie_and_both_its_neighbours_are_rounded_as_numpy_does(half: str) -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        numbers = patterns.view(HALVES[half][0]).astype(np.float64)
    steps = np.stack([numbers[:-1], numbers[1:]])[:, np.isfinite(numbers[:-1]) & np.isfinite(numbers[1:])]
    ties = steps.mean(axis=0).astype(np.float32)
    ties = np.append(ties, OVERFLOWS_AT[half] * np.array([1, -1])).astype(np.float32)
    for exact in (ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))):
        assert np.array_equal(narrowed(exact, half), narrowed_by_numpy(exact, half))


@settings(max_examples=500)
@given(st.sampled_from(list(HALVES)), st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
def test_any_float32_is_rounded_as_numpy_does(half: str, patterns: list[int]) -> None:
    exact = np.array(patterns, np.uint32).view(np.float32)
    is_nan = np.isnan(exact)

    got, want = narrowed(exact, half), narrowed_by_numpy(exact, half)

    assert np.array_equal(got[~is_nan], want[~is_nan])
    assert np.isnan(got[is_nan].view(HALVES[half][0]).astype(np.float32)).all()
