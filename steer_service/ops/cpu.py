"""The CPU kernel: one pass over the rows of a plan, float32 inside, the stream in model dtype outside.

Rows are read and written in place at raw addresses, so that bfloat16 and float16, with which Numba cannot calculate,
pass as their 16 bits. T: rows of the step; D: hidden size; N: rows of the plan; R: requests of the plan; S: slots; K:
operations.
"""

from typing import Any

import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

# Not "nnan" or "ninf": the kernel looks for NaN and Inf on purpose.
FASTMATH = {"reassoc", "contract", "nsz", "arcp"}

BAD_VALUE = np.uint8(1)
"""In `bad_N`: the row went bad; if it was to be steered at this layer, it was left unsteered."""


# -- 16-bit floats as their bits ---------------------------------------------------------------------------------------


@intrinsic
def _pointer(typingctx: Any, address: Any) -> Any:
    """The address as a void pointer, which `carray` turns into an array."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


def _bitcast(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))


@intrinsic
def _float_of(typingctx: Any, bits: Any) -> Any:
    """The float32 with these bits."""
    return types.float32(types.uint32), _bitcast


@intrinsic
def _bits_of(typingctx: Any, number: Any) -> Any:
    """The bits of a float32."""
    return types.uint32(types.float32), _bitcast


@numba.njit
def widen_bfloat16(bits):  # type: ignore[no-untyped-def]
    """The float32 equal to the bfloat16 with these bits."""
    return _float_of(np.uint32(np.uint32(bits) << np.uint32(16)))


@numba.njit
def narrow_bfloat16(number):  # type: ignore[no-untyped-def]
    """The bits of the bfloat16 nearest to a float32, ties to even; every NaN becomes a quiet one."""
    bits = _bits_of(number)
    rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16(np.uint32(0x7FC00000 if is_nan else rounded) >> np.uint32(16))


@numba.njit
def widen_float16(bits):  # type: ignore[no-untyped-def]
    """The float32 equal to the float16 with these bits."""
    sign = np.uint32((np.uint32(bits) & np.uint32(0x8000)) << np.uint32(16))
    rest = np.uint32((np.uint32(bits) & np.uint32(0x7FFF)) << np.uint32(13))  # exponent and mantissa in their places
    normal = np.uint32(rest + np.uint32(112 << 23))  # the exponent's bias is 15 there, 127 here
    special = np.uint32(rest + np.uint32(224 << 23))  # Inf and NaN: exponent 31 there, 255 here
    # Subnormal: as the mantissa of a number with exponent -14, whose leading 1 is then taken away, exactly.
    subnormal = _bits_of(_float_of(np.uint32(rest + np.uint32(113 << 23))) - np.float32(2.0**-14))
    is_special, is_subnormal = rest >= np.uint32(0x0F800000), rest < np.uint32(0x00800000)
    return _float_of(np.uint32(sign | np.uint32(special if is_special else (subnormal if is_subnormal else normal))))


@numba.njit
def narrow_float16(number):  # type: ignore[no-untyped-def]
    """The bits of the float16 nearest to a float32, ties to even; every NaN becomes a quiet one."""
    bits = _bits_of(number)
    rest = np.uint32(bits & np.uint32(0x7FFFFFFF))
    is_odd = (rest >> np.uint32(13)) & np.uint32(1)
    normal = np.uint32(np.uint32(rest - np.uint32(112 << 23) + np.uint32(0xFFF) + is_odd) >> np.uint32(13))
    # Below 2**-14 the step is 2**-24, which is float32's own step from 0.5 on: its addition rounds.
    subnormal = np.uint32(_bits_of(_float_of(rest) + np.float32(0.5)) - np.uint32(0x3F000000))
    rounded = np.uint32(subnormal if rest < np.uint32(113 << 23) else normal)
    is_infinite, is_nan = rest >= np.uint32(143 << 23), rest > np.uint32(0x7F800000)
    finite_or_not = np.uint32(0x7E00 if is_nan else (np.uint32(0x7C00) if is_infinite else rounded))
    return np.uint16(finite_or_not | np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000)))


# Numba chooses by type, and caches no kernel to which functions are handed. So float16 lies in int16 arrays, bfloat16
# in uint16 arrays, and what is below is written once for all three.


def _widened(stored: Any) -> Any:
    """A stored element as float32."""
    raise NotImplementedError("within the kernel only")


def _narrowed(number: Any, target_D: Any) -> Any:
    """A float32 as an element of `target_D`."""
    raise NotImplementedError("within the kernel only")


@overload(_widened)
def _choose_widened(stored):  # type: ignore[no-untyped-def]
    return {
        types.float32: lambda stored: stored,
        types.uint16: lambda stored: widen_bfloat16(stored),
        types.int16: lambda stored: widen_float16(stored),
    }[stored]


@overload(_narrowed)
def _choose_narrowed(number, target_D):  # type: ignore[no-untyped-def]
    return {
        types.float32: lambda number, target_D: number,
        types.uint16: lambda number, target_D: narrow_bfloat16(number),
        types.int16: lambda number, target_D: np.int16(narrow_float16(number)),
    }[target_D.dtype]


# -- one row -----------------------------------------------------------------------------------------------------------


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
def _is_good(x_D):  # type: ignore[no-untyped-def]
    """True if the sum of the squares is finite in float32: no NaN, no Inf, and nothing that a norm turns into one."""
    total = np.float32(0.0)
    for d in range(x_D.shape[0]):
        total += x_D[d] * x_D[d]
    return total < np.float32(np.inf)


@numba.njit
def _read(hidden_D, residual_D, has_residual, x_D):  # type: ignore[no-untyped-def]
    """The stream in float32: the layer's one tensor, or the sum of its two."""
    if has_residual:
        for d in range(x_D.shape[0]):
            x_D[d] = _widened(hidden_D[d]) + _widened(residual_D[d])
    else:
        for d in range(x_D.shape[0]):
            x_D[d] = _widened(hidden_D[d])


@numba.njit
def _write(x_D, target_D):  # type: ignore[no-untyped-def]
    for d in range(x_D.shape[0]):
        target_D[d] = _narrowed(x_D[d], target_D)


@numba.njit
def _round(x_D, like_D):  # type: ignore[no-untyped-def]
    """Rounds to what `like_D` can hold."""
    for d in range(x_D.shape[0]):
        x_D[d] = _widened(_narrowed(x_D[d], like_D))


@numba.njit
def _capture(x_D, first_row, ordinal, is_wide, element):  # type: ignore[no-untyped-def]
    """Writes the row to its place in the region that begins at address `first_row`."""
    shape = (np.int64(ordinal) + 1, x_D.shape[0])
    if is_wide:
        _write(x_D, numba.carray(_pointer(first_row), shape, np.float32)[ordinal])
    else:
        _write(x_D, numba.carray(_pointer(first_row), shape, element)[ordinal])


# -- all rows ----------------------------------------------------------------------------------------------------------


@numba.njit
def _tap(  # type: ignore[no-untyped-def]
    element,
    hidden_address, residual_address, total_rows, width,
    rows_N, requests_N, slots_N, capture_rows_N, slots_R, wide_R, before_R, after_R,
    op_rows_SK, op_counts_S, directions, coefficients, checks, bad_N,
):  # fmt: skip
    """Steers and captures the planned rows of one layer and returns how many of them are bad here.

    `residual_address` 0 means that the layer returns one tensor. `before_R` and `after_R` hold, per request, the
    address of this layer's first captured row, or 0. With `checks`, every row of a request with a slot is looked at.
    Arrays are C-contiguous.
    """
    has_residual = residual_address != 0
    hidden_TD = numba.carray(_pointer(hidden_address), (total_rows, width), element)
    stream_TD = numba.carray(
        _pointer(residual_address if has_residual else hidden_address), (total_rows, width), element
    )
    x_D = np.empty(width, np.float32)
    bad_count = 0
    for n in range(rows_N.shape[0]):
        row, request, slot, ordinal = rows_N[n], requests_N[n], slots_N[n], capture_rows_N[n]
        before = before_R[request] if ordinal >= 0 else np.int64(0)
        after = after_R[request] if ordinal >= 0 else np.int64(0)
        is_steered = slot >= 0 and op_counts_S[slot] > 0
        is_checked = checks and slots_R[request] >= 0
        if not (is_steered or is_checked or before != 0 or after != 0):
            continue
        _read(hidden_TD[row], stream_TD[row], has_residual, x_D)
        if before != 0:
            _capture(x_D, before, ordinal, wide_R[request], element)
        if is_steered:
            _run_operations(x_D, slot, op_rows_SK, op_counts_S, directions, coefficients)
            _round(x_D, stream_TD[row])
            if _is_good(x_D):
                _write(x_D, stream_TD[row])
                if has_residual:
                    for d in range(width):
                        hidden_TD[row, d] = 0
            else:
                bad_N[n] = BAD_VALUE
                bad_count += 1
                _read(hidden_TD[row], stream_TD[row], has_residual, x_D)
        if after != 0:
            _capture(x_D, after, ordinal, wide_R[request], element)
        if is_checked and not is_steered:
            _round(x_D, stream_TD[row])
            if not _is_good(x_D):
                bad_N[n] = BAD_VALUE
                bad_count += 1
    return bad_count


@numba.njit(nogil=True, cache=True)
def tap_float32(*step):  # type: ignore[no-untyped-def]
    """`_tap` for a float32 stream."""
    return _tap(np.float32, *step)


@numba.njit(nogil=True, cache=True)
def tap_bfloat16(*step):  # type: ignore[no-untyped-def]
    """`_tap` for a bfloat16 stream: widened exactly, computed in float32, rounded once."""
    return _tap(np.uint16, *step)


@numba.njit(nogil=True, cache=True)
def tap_float16(*step):  # type: ignore[no-untyped-def]
    """`_tap` for a float16 stream: widened exactly, computed in float32, rounded once."""
    return _tap(np.int16, *step)


KERNELS = {"float32": tap_float32, "bfloat16": tap_bfloat16, "float16": tap_float16}
"""Model dtype -> the kernel that serves it."""
