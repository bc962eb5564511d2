"""The CPU kernel: one pass over the rows of a plan, float32 inside, the stream in model dtype outside.

Rows are read and written in place at raw addresses, so that bfloat16, which Numba does not know, passes as its 16
bits. T: rows of the step; D: hidden size; N: rows of the plan; R: requests of the plan; S: slots; K: operations.
"""

from typing import Any

import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

# Not "nnan" or "ninf": the kernel looks for NaN and Inf on purpose.
FASTMATH = {"reassoc", "contract", "nsz", "arcp"}

BAD_VALUE = np.uint8(1)
"""In `bad_N`: the steered row was not finite, and the row was left unsteered."""


@intrinsic
def _pointer(typingctx: Any, address: Any) -> Any:
    """The address as a void pointer, which `carray` turns into an array."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@numba.njit(inline="always")
def _round_bfloat16(bits: np.uint32) -> np.uint32:
    """The upper half of a float32, rounded to nearest even."""
    return (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


@numba.njit(fastmath=FASTMATH)
def _run_operations(x_D, slot, op_rows_SK, op_counts_S, directions, coefficients):  # type: ignore[no-untyped-def]
    width = x_D.shape[0]
    for k in range(op_counts_S[slot]):
        row = op_rows_SK[slot, k]
        direction_D = directions[row]
        a, b = coefficients[row, 0], coefficients[row, 1]
        low, high = coefficients[row, 2], coefficients[row, 3]
        if a == np.float32(1.0) and low == -np.inf and high == np.inf:
            change = b  # p' - p = b exactly; p need not be known
        else:
            p = np.float32(0.0)
            for d in range(width):
                p += x_D[d] * direction_D[d]
            if low == -np.inf and high == np.inf:
                change = (a - np.float32(1.0)) * p + b
            else:
                change = min(max(a * p + b, low), high) - p
        if change != np.float32(0.0):
            for d in range(width):
                x_D[d] += change * direction_D[d]


@numba.njit(fastmath=FASTMATH)
def _is_finite(x_D):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for d in range(x_D.shape[0]):
        total += x_D[d] * np.float32(0.0)  # 0 unless an element is NaN or Inf, then NaN
    return total == np.float32(0.0)


@numba.njit(nogil=True, cache=True, fastmath=FASTMATH)
def tap_float32(  # type: ignore[no-untyped-def]
    hidden_address, residual_address, total_rows, width,
    rows_N, requests_N, positions_N, slots_R, limits_R, captures_R,
    op_rows_SK, op_counts_S, directions, coefficients, bad_N,
):  # fmt: skip
    """Steers and captures the planned rows of one layer whose stream is float32; returns how many rows went bad.

    `residual_address` 0 means that the layer returns one tensor. `captures_R` holds, per request, the address of this
    layer's first captured row, or 0; a row at or beyond `limits_R` is not captured. Arrays are C-contiguous.
    """
    hidden_TD = numba.carray(_pointer(hidden_address), (total_rows, width), np.float32)
    has_residual = residual_address != 0
    residual_TD = numba.carray(
        _pointer(residual_address if has_residual else hidden_address), (total_rows, width), np.float32
    )
    x_D = np.empty(width, np.float32)
    bad_count = 0
    for n in range(rows_N.shape[0]):
        row, request = rows_N[n], requests_N[n]
        slot = slots_R[request]
        is_steered = slot >= 0 and op_counts_S[slot] > 0
        is_captured = captures_R[request] != 0 and positions_N[n] < limits_R[request]
        if not (is_steered or is_captured):
            continue
        if has_residual:
            for d in range(width):
                x_D[d] = hidden_TD[row, d] + residual_TD[row, d]
        else:
            for d in range(width):
                x_D[d] = hidden_TD[row, d]
        if is_steered:
            _run_operations(x_D, slot, op_rows_SK, op_counts_S, directions, coefficients)
            if _is_finite(x_D):
                for d in range(width):
                    residual_TD[row, d] = x_D[d]
                if has_residual:
                    for d in range(width):
                        hidden_TD[row, d] = 0.0
            else:
                bad_N[n] = BAD_VALUE
                bad_count += 1
        if is_captured:
            target = captures_R[request] + np.int64(positions_N[n]) * np.int64(width) * 4
            target_D = numba.carray(_pointer(target), (width,), np.float32)
            for d in range(width):
                target_D[d] = x_D[d]
    return bad_count


@numba.njit(nogil=True, cache=True, fastmath=FASTMATH)
def tap_bfloat16(  # type: ignore[no-untyped-def]
    hidden_address, residual_address, total_rows, width,
    rows_N, requests_N, positions_N, slots_R, limits_R, captures_R,
    op_rows_SK, op_counts_S, directions, coefficients, bad_N,
):  # fmt: skip
    """The same as `tap_float32` for a bfloat16 stream: widened exactly, computed in float32, rounded once."""
    hidden_TD = numba.carray(_pointer(hidden_address), (total_rows, width), np.uint16)
    has_residual = residual_address != 0
    residual_TD = numba.carray(
        _pointer(residual_address if has_residual else hidden_address), (total_rows, width), np.uint16
    )
    x_D = np.empty(width, np.float32)
    x_bits_D = x_D.view(np.uint32)
    other_D = np.empty(width, np.float32)
    other_bits_D = other_D.view(np.uint32)
    rounded_D = np.empty(width, np.uint16)
    bad_count = 0
    for n in range(rows_N.shape[0]):
        row, request = rows_N[n], requests_N[n]
        slot = slots_R[request]
        is_steered = slot >= 0 and op_counts_S[slot] > 0
        is_captured = captures_R[request] != 0 and positions_N[n] < limits_R[request]
        if not (is_steered or is_captured):
            continue
        for d in range(width):
            x_bits_D[d] = np.uint32(hidden_TD[row, d]) << np.uint32(16)
        if has_residual:
            for d in range(width):
                other_bits_D[d] = np.uint32(residual_TD[row, d]) << np.uint32(16)
            for d in range(width):
                x_D[d] += other_D[d]
        if is_steered:
            _run_operations(x_D, slot, op_rows_SK, op_counts_S, directions, coefficients)
        is_good = not is_steered or _is_finite(x_D)
        for d in range(width):
            rounded_D[d] = np.uint16(_round_bfloat16(x_bits_D[d]))
        if is_steered:
            for d in range(width):
                if (rounded_D[d] & np.uint16(0x7F80)) == np.uint16(0x7F80):  # rounded up to infinity
                    is_good = False
            if is_good:
                for d in range(width):
                    residual_TD[row, d] = rounded_D[d]
                if has_residual:
                    for d in range(width):
                        hidden_TD[row, d] = 0
            else:
                bad_N[n] = BAD_VALUE
                bad_count += 1
        if is_captured:
            target = captures_R[request] + np.int64(positions_N[n]) * np.int64(width) * 2
            target_D = numba.carray(_pointer(target), (width,), np.uint16)
            for d in range(width):
                target_D[d] = rounded_D[d]
    return bad_count


KERNELS = {"float32": tap_float32, "bfloat16": tap_bfloat16}
"""Model dtype -> the kernel that serves it."""
