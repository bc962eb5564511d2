"""One row of many: mean, last and largest, in every dtype, as NumPy computes them in float64."""

import numpy as np
import pytest

from steer_service.core.arrays import DTYPES
from steer_service.core.capture import Pooling
from steer_service.runtime.pooling import ROWS_AT_ONCE, pooled

LENGTHS = [1, 2, ROWS_AT_ONCE - 1, ROWS_AT_ONCE, ROWS_AT_ONCE + 1, 1000]


def rows_of(count: int, dtype: str, hidden_size: int = 7) -> np.ndarray:
    return np.random.default_rng(count).normal(1, 3, (count, hidden_size)).astype(DTYPES[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("count", LENGTHS)
def test_a_mean_is_that_of_float64_rounded_once(count: int, dtype: str) -> None:
    rows = rows_of(count, dtype)

    mean = pooled(rows, Pooling.MEAN)

    assert (mean.shape, mean.dtype) == ((1, 7), np.float32)
    want = rows.astype(np.float64).mean(axis=0)
    assert np.abs(mean[0] - want).max() <= np.spacing(np.abs(want).astype(np.float32)).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("count", LENGTHS)
def test_last_and_largest_are_values_of_the_rows_in_their_dtype(count: int, dtype: str) -> None:
    rows = rows_of(count, dtype)

    last, largest = pooled(rows, Pooling.LAST), pooled(rows, Pooling.MAX)

    assert last.dtype == largest.dtype == rows.dtype
    assert np.array_equal(last, rows[-1:])
    assert np.array_equal(largest[0].astype(np.float64), rows.astype(np.float64).max(axis=0))


def test_a_mean_of_many_rows_around_one_is_not_swallowed_by_their_dtype() -> None:
    rows = np.full((4000, 3), 1.0, DTYPES["bfloat16"])
    rows[::2] = DTYPES["bfloat16"].type(1.0078125)

    assert pooled(rows, Pooling.MEAN).tolist() == [[1.00390625] * 3]
    huge = np.full((300, 2), 3e38, np.float32)
    assert pooled(huge, Pooling.MEAN).tolist() == huge[:1].tolist()


@pytest.mark.parametrize("pooling", [Pooling.MEAN, Pooling.LAST, Pooling.MAX])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_rows_give_no_row_and_the_result_is_an_array_of_its_own(pooling: Pooling, dtype: str) -> None:
    rows = rows_of(5, dtype)

    assert not np.shares_memory(pooled(rows, pooling), rows)
    nothing = pooled(rows[:0], pooling)
    assert (nothing.shape, nothing.dtype) == ((0, 7), DTYPES[pooling.dtype_of(dtype)])


def test_what_is_not_finite_stays_so() -> None:
    rows = np.array([[1.0, np.inf, np.nan, -np.inf], [2.0, -np.inf, 0.0, -np.inf]], np.float32)

    assert np.array_equal(pooled(rows, Pooling.MEAN)[0], [1.5, np.nan, np.nan, -np.inf], equal_nan=True)
    assert np.array_equal(pooled(rows, Pooling.MAX)[0], [2.0, np.inf, np.nan, -np.inf], equal_nan=True)
