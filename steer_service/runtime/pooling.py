"""Pools the captured rows of an output: one row for each layer and site, by NumPy, in the caller's thread.

It goes over the rows a few at a time: neither memory nor the time between two releases of Python's lock grows with
them. A row of a mean is summed in float64 in the order of positions and rounded to float32 once, so that the order and
the number of rows do not matter beyond the last bit.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from steer_service.core.arrays import DTYPES, Float32Array, HiddenArray
from steer_service.core.capture import Pooling

ROWS_AT_ONCE = 64
"""Rows that are widened at a time; they stay in a core's cache."""


def pooled(rows_TD: HiddenArray, pooling: Pooling) -> HiddenArray:
    """One row for all `rows_TD`, shape [1, D], in a new array; shape [0, D] if there are none.

    It has the dtype of `pooling.dtype_of`. T rows, D hidden size. The positions of the rows ascend.
    """
    if not len(rows_TD):
        return np.empty_like(rows_TD, DTYPES["float32"] if pooling is Pooling.MEAN else None)
    match pooling:
        case Pooling.MEAN:
            return _mean(rows_TD)
        case Pooling.LAST:
            return rows_TD[-1:].copy()
        case Pooling.MAX:
            return _largest(rows_TD)
    raise AssertionError("what is not pooled has no pooled row")


def _mean(rows_TD: HiddenArray) -> Float32Array:
    sum_D = np.zeros(rows_TD.shape[1], np.float64)
    with np.errstate(invalid="ignore"):  # of infinite values; they are the model's own
        for part_TD in _widened_parts(rows_TD):
            sum_D += np.add.reduce(part_TD, axis=0, dtype=np.float64)
    return (sum_D / len(rows_TD)).astype(np.float32)[None]


def _largest(rows_TD: HiddenArray) -> HiddenArray:
    largest_D = np.full(rows_TD.shape[1], -np.inf, np.float32)
    for part_TD in _widened_parts(rows_TD):
        np.maximum(largest_D, part_TD.max(axis=0), out=largest_D)
    return largest_D.astype(rows_TD.dtype)[None]  # exact: each element is one of the rows'


def _widened_parts(rows_TD: npt.NDArray[Any]) -> Iterator[Float32Array]:
    """The rows as float32, which is exact, a few at a time."""
    for start in range(0, len(rows_TD), ROWS_AT_ONCE):
        yield _widened(rows_TD[start : start + ROWS_AT_ONCE])


def _widened(part_TD: npt.NDArray[Any]) -> Float32Array:
    if part_TD.dtype != DTYPES["bfloat16"]:
        return part_TD.astype(np.float32, copy=False)
    # The conversion of ml_dtypes holds Python's lock. The bits of a bfloat16 are the upper half of a float32's.
    bits_TD = part_TD.view(np.uint16).astype(np.uint32)
    bits_TD <<= np.uint32(16)
    return bits_TD.view(np.float32)
