"""What a layer's operations do to rows, in float64, and how much float32 may lose on the way; see docs/numerics.md.

Tests of every backend and the proof at start compare rows with it.

T: rows; D: hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from steer_service.core.arrays import OVERFLOWS_AT
from steer_service.core.spans import mask_of
from steer_service.core.specs import AblationSpec, AddScaling, AddSpec, SteeringOp
from steer_service.ops.program import has_norms

Float64Array = npt.NDArray[np.float64]

UNIT = 2.0**-24
"""Half a step of float32 at 1: the relative error of one operation of its arithmetic."""

LEAST_NORM = 1e-18
"""Of a row: a smaller norm has a square that float32 holds poorly, and operations with norms may take it for 0."""


ROUNDING = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""The relative error of rounding an element once to the stream's dtype; float32 is not rounded again."""

LEAST_STEP = {"float32": 0.0, "bfloat16": 2.0**-134, "float16": 2.0**-25}
"""The absolute error of that rounding where the dtype has subnormal numbers only."""

LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Truth:
    """What a layer's operations do to rows, in float64."""

    rows_TD: Float64Array
    """The steered rows."""
    reach_T: Float64Array
    """How much passed through float32 on the way, see docs/numerics.md: the tolerance is a multiple of it."""
    largest_T: Float64Array
    """Norm of the largest quantity on the way: beyond float32's range nothing is promised but a bad row."""

    def tolerance_T(self) -> Float64Array:
        """The most by which a row may differ from the truth, beside one rounding to the stream's dtype."""
        return (4.0 + np.sqrt(self.rows_TD.shape[1])) * UNIT * self.reach_T


def truth_of(
    stream_TD: Float64Array, operations: Sequence[SteeringOp], positions_T: npt.NDArray[np.int32] | None = None
) -> Truth:
    """The contract, operation by operation, with the running bound of what float32 may lose.

    `positions_T`: the position of each row, ascending; by default row i has position i.
    """
    if positions_T is None:
        positions_T = np.arange(len(stream_TD), dtype=np.int32)
    norm_T = np.linalg.norm(stream_TD, axis=1)
    truth = Truth(stream_TD, norm_T, norm_T)
    for operation in operations:
        after, acts_T = _apply(truth, operation), acts_on(operation, positions_T)
        truth = Truth(
            np.where(acts_T[:, None], after.rows_TD, truth.rows_TD),
            np.where(acts_T, after.reach_T, truth.reach_T),
            np.where(acts_T, after.largest_T, truth.largest_T),
        )
    return truth


def acts_on(operation: SteeringOp, positions_T: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """Which of the rows at these positions, all of the prompt, the operation acts on."""
    if operation.positions is None:
        return np.ones(len(positions_T), np.bool_)
    end = int(positions_T.max(initial=-1)) + 1
    return mask_of(operation.positions.resolve_within(end, end), end)[positions_T]


@dataclass(frozen=True)
class Verdict:
    """How steered rows compare with the truth."""

    ratio_T: Float64Array
    """Error of each row in units of the tolerance; NaN for rows that are bad."""
    finding: str
    """The first thing that is wrong with them; "" if nothing is."""


def verdict_on(dtype: str, got_TD: Float64Array, bad_T: npt.NDArray[np.bool_], truth: Truth) -> Verdict:
    """Compares rows that a kernel steered in `dtype`, and the rows that it calls bad, with the truth."""
    tolerance_T = truth.tolerance_T()
    may_be_bad_T, must_be_bad_T = _bad_rows(dtype, truth, tolerance_T)
    error_TD = np.abs(got_TD - truth.rows_TD)
    error_TD = np.maximum(error_TD - ROUNDING[dtype] * np.abs(truth.rows_TD) - LEAST_STEP[dtype], 0.0)
    ratio_T = np.linalg.norm(error_TD, axis=1) / np.maximum(tolerance_T, np.finfo(np.float64).tiny)
    ratio_T[bad_T] = np.nan
    findings = {
        "called bad, and good": bad_T & ~may_be_bad_T,
        "called good, and bad": must_be_bad_T & ~bad_T,
        "outside the tolerance": ~(ratio_T <= 1.0) & ~bad_T,
    }
    for finding, is_wrong_T in findings.items():
        if is_wrong_T.any():
            rows = np.flatnonzero(is_wrong_T).tolist()
            return Verdict(ratio_T, f"{dtype}: errors of {ratio_T} of the tolerance: rows {rows} are {finding}")
    return Verdict(ratio_T, "")


def _bad_rows(
    dtype: str, truth: Truth, tolerance_T: Float64Array
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Rows that may be bad and rows that must be; between the two lie those that the tolerance can tip."""
    norm_T, peak_T = np.linalg.norm(truth.rows_TD, axis=1), np.abs(truth.rows_TD).max(axis=1)
    slack = 1.0 + 2.0 * ROUNDING[dtype] + 1e-3  # of the rounding, and of summing the squares
    high_T, low_T = slack * norm_T + tolerance_T, norm_T / slack - tolerance_T
    may_T = (high_T**2 >= LARGEST) | (truth.largest_T >= 0.1 * LARGEST) | (peak_T + tolerance_T >= OVERFLOWS_AT[dtype])
    must_T = (np.maximum(low_T, 0.0) ** 2 > LARGEST) | (peak_T - tolerance_T >= OVERFLOWS_AT[dtype])
    return may_T, must_T


def _apply(truth: Truth, operation: SteeringOp) -> Truth:
    """The rows after one operation, and how much passed through it."""
    x_TD, reach_T = truth.rows_TD, truth.reach_T
    norm_T = np.linalg.norm(x_TD, axis=1)
    unit_D, change_T, gain, slope, moved_T = _change(x_TD, norm_T, operation)
    gain_T = np.full_like(norm_T, gain)
    if operation.max_relative_change is not None:
        limit = operation.max_relative_change
        gain_T = 1.0 + slope + np.minimum(limit, np.abs(change_T) / np.maximum(norm_T, LEAST_NORM))
        change_T = np.clip(change_T, -limit * norm_T, limit * norm_T)
    y_TD = x_TD + change_T[:, None] * unit_D
    length_T = np.linalg.norm(y_TD, axis=1)
    after = Truth(
        y_TD, gain_T * reach_T + length_T + moved_T, np.maximum(truth.largest_T, np.maximum(length_T, moved_T))
    )
    if not has_norms(operation):
        return after
    if operation.keep_norm:
        after = _with_norm(after, norm_T, reach_T)
    largest_T = np.maximum(after.largest_T, np.maximum(norm_T, length_T) ** 2)  # norms are squared in float32
    is_tiny_T = (norm_T < LEAST_NORM) & (norm_T > 0) | (norm_T == 0) & (reach_T > 0) & operation.keep_norm
    return Truth(after.rows_TD, np.where(is_tiny_T, np.inf, after.reach_T), largest_T)


def _with_norm(truth: Truth, norm_T: Float64Array, reach_T: Float64Array) -> Truth:
    """The rows with these norms, which float32 knows as well as `reach_T` says; a lost direction promises nothing."""
    length_T = np.linalg.norm(truth.rows_TD, axis=1)
    is_lost_T = 2.0 * truth.tolerance_T() >= length_T
    factor_T = np.where(is_lost_T, 1.0, norm_T / np.where(is_lost_T, 1.0, length_T))
    known_T = np.where(is_lost_T, 0.0, truth.reach_T)  # of a lost row it may be infinite, and the factor 0
    return Truth(
        truth.rows_TD * factor_T[:, None],
        np.where(is_lost_T, np.inf, 2.0 * factor_T * known_T + reach_T + norm_T),
        np.where(is_lost_T, np.inf, truth.largest_T),
    )


def _change(
    x_TD: Float64Array, norm_T: Float64Array, operation: SteeringOp
) -> tuple[Float64Array, Float64Array, float, float, Float64Array]:
    """The direction and the signed length of the change, before any limit.

    Then by how much the operation can enlarge an error of x, how much of such an error the change has, and how much the
    operation handles.
    """
    vector_D = operation.vector.astype(np.float64)
    norm = np.sqrt(vector_D @ vector_D)
    unit_D = vector_D / norm
    if isinstance(operation, AddSpec):
        scale = abs(operation.scale)
        if operation.scaling is AddScaling.RELATIVE:
            return unit_D, operation.scale * norm_T, 1.0 + scale, scale, scale * norm_T
        return unit_D, np.full_like(norm_T, operation.scale * norm), 1.0, 0.0, np.full_like(norm_T, scale * norm)
    p_T = x_TD @ unit_D
    if isinstance(operation, AblationSpec):
        by = operation.scale - 1.0
        return unit_D, by * p_T, max(1.0, abs(operation.scale)), abs(by), (1.0 + abs(by)) * norm_T
    low = -np.inf if operation.min is None else operation.min
    high = np.inf if operation.max is None else operation.max
    return unit_D, np.clip(p_T, low, high) - p_T, 1.0, 1.0, norm_T
