"""The CPU kernel: one pass over the rows of a plan, float32 inside, the residual stream in model dtype outside.

Rows are read and written in place at raw addresses. Numba cannot calculate with bfloat16 and float16, so they pass as
their 16 bits. Tables are passed by address too, which keeps a call small. Between two layers the model reads its
weights, so everything that a call touches must come from memory again.

T: rows of the step; D: hidden size; N: rows of the plan; R: requests of the plan; S: slots; K: operations; W: rows of
the bank; L: layers; C: columns; H: threads.
"""

import ctypes
import functools
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import torch
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from steer_service.core import layer_change
from steer_service.core.layer_change import ACTED, CAPPED, CHANGE_COLUMNS
from steer_service.ops import plan
from steer_service.ops.kernel_cache import from_cache
from steer_service.ops.plan import ALL_SCOPES

# Not "nnan" or "ninf": the kernel looks for NaN and Inf on purpose.
FASTMATH = {"reassoc", "contract", "nsz", "arcp"}

BAD_VALUE = np.uint8(1)
"""In `bad_N`: the row is bad; if this layer steers it, it was left unsteered."""


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


# Numba dispatches by type, and does not cache a kernel that takes functions as arguments. So float16 is stored in int16
# arrays and bfloat16 in uint16 arrays, and the code below is written once for all three dtypes.


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


@numba.njit
def _acts(coefficients_C, scopes):  # type: ignore[no-untyped-def]
    """True if the operation acts on a row with this mask."""
    return scopes == ALL_SCOPES or (scopes >> np.uint64(coefficients_C[4])) & np.uint64(1) != np.uint64(0)


@numba.njit
def _count_acting(op_rows_K, count, coefficients_WC, scopes):  # type: ignore[no-untyped-def]
    """How many operations act on a row with this mask."""
    if scopes == ALL_SCOPES:
        return np.int64(count)
    acting = np.int64(0)
    for k in range(count):
        acting += _acts(coefficients_WC[op_rows_K[k]], scopes)
    return acting


@numba.njit(fastmath=FASTMATH)
def _norm(x_D):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for d in range(x_D.shape[0]):
        total += x_D[d] * x_D[d]
    return np.sqrt(total)


@numba.njit(fastmath=FASTMATH)
def _scale_to_norm(x_D, norm):  # type: ignore[no-untyped-def]
    """Gives the row this norm: zeros stay zeros if it is 0, else they become NaN, as does a row beyond float32."""
    now = _norm(x_D)
    if norm == np.float32(0.0) and now == np.float32(0.0):
        return
    # Numba would raise for a division by 0, and cannot from here.
    factor = norm / now if now > np.float32(0.0) and now < np.float32(np.inf) else np.float32(np.nan)
    for d in range(x_D.shape[0]):
        x_D[d] *= factor


@numba.njit(fastmath=FASTMATH)
def _run_operations(x_D, op_rows_K, count, directions_WD, coefficients_WC, scopes):  # type: ignore[no-untyped-def]
    """Changes the row in place; True if its projection was outside of the bounds of a cap."""
    width, is_capped = x_D.shape[0], False
    for k in range(count):
        row = op_rows_K[k]
        if not _acts(coefficients_WC[row], scopes):
            continue
        direction_D = directions_WD[row]
        a, b = coefficients_WC[row, 0], coefficients_WC[row, 1]
        low, high = coefficients_WC[row, 2], coefficients_WC[row, 3]
        is_relative, limit = coefficients_WC[row, 5] != np.float32(0.0), coefficients_WC[row, 6]
        keeps_norm = coefficients_WC[row, 7] != np.float32(0.0)
        norm = np.float32(1.0)
        if is_relative or keeps_norm or limit < np.inf:
            norm = _norm(x_D)
        if a == np.float32(1.0) and low == -np.inf and high == np.inf:
            change = b * norm if is_relative else b  # p' - p = b exactly; p need not be known
        else:
            p = np.float32(0.0)
            for d in range(width):
                p += x_D[d] * direction_D[d]
            if low == -np.inf and high == np.inf:
                change = (a - np.float32(1.0)) * p + b
            else:
                change = min(max(a * p + b, low), high) - p
                is_capped = is_capped or change != np.float32(0.0)
        if limit < np.inf:
            # Without a norm there is no limit: NaN makes the row bad.
            change = min(max(change, -limit * norm), limit * norm) if norm < np.float32(np.inf) else np.float32(np.nan)
        if change != np.float32(0.0):
            for d in range(width):
                x_D[d] += change * direction_D[d]
            if keeps_norm:
                _scale_to_norm(x_D, norm)
    return is_capped


@numba.njit
def _read(hidden_D, residual_D, has_residual, x_D):  # type: ignore[no-untyped-def]
    """The residual stream in float32: the layer's one tensor, or the sum of its two."""
    if has_residual:
        for d in range(x_D.shape[0]):
            x_D[d] = _widened(hidden_D[d]) + _widened(residual_D[d])
    else:
        for d in range(x_D.shape[0]):
            x_D[d] = _widened(hidden_D[d])


@numba.njit(fastmath=FASTMATH)
def _relative_change(hidden_D, residual_D, has_residual, y_D):  # type: ignore[no-untyped-def]
    """|y - x| / |x|, with sums in float64; x is what `_read` reads. NaN if x is zeros."""
    before, moved = np.float64(0.0), np.float64(0.0)
    for d in range(y_D.shape[0]):
        x = _widened(hidden_D[d])
        if has_residual:
            x += _widened(residual_D[d])
        before += np.float64(x) * np.float64(x)
        moved += np.float64(y_D[d] - x) * np.float64(y_D[d] - x)
    return np.float32(np.sqrt(moved / before)) if before > 0.0 else np.float32(np.nan)


@numba.njit(fastmath=FASTMATH)
def _round(x_D, rounded_D):  # type: ignore[no-untyped-def]
    """Rounds `x_D` to the dtype of `rounded_D`, and writes it there too; False if the row is bad.

    A row is good if the sum of its squares is finite in float32: no NaN or Inf, and a norm makes none.
    """
    total = np.float32(0.0)
    for d in range(x_D.shape[0]):
        rounded_D[d] = _narrowed(x_D[d], rounded_D)
    for d in range(x_D.shape[0]):
        x = _widened(rounded_D[d])
        x_D[d] = x
        total += x * x
    return total < np.float32(np.inf)


@numba.njit
def _write(x_D, target_D):  # type: ignore[no-untyped-def]
    for d in range(x_D.shape[0]):
        target_D[d] = _narrowed(x_D[d], target_D)


@numba.njit
def _table(address, shape, dtype):  # type: ignore[no-untyped-def]
    return numba.carray(_pointer(address), shape, dtype)


@numba.njit
def _capture(x_D, first_row, ordinal, captures_float32, element):  # type: ignore[no-untyped-def]
    """Writes the row to its place in the region that begins at address `first_row`."""
    shape = (np.int64(ordinal) + 1, x_D.shape[0])
    if captures_float32:
        _write(x_D, _table(first_row, shape, np.float32)[ordinal])
    else:
        _write(x_D, _table(first_row, shape, element)[ordinal])


class KernelCall(ctypes.Structure):
    """The kernel's arguments: the addresses of tables, C-contiguous, and their sizes."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("rows_N", "requests_N", "slots_N", "scopes_N", "capture_rows_N", "bad_N", "changes_NLC", "rows"),
            *("slots_R", "captures_float32_R", "reports_change_R", "before_LR", "after_LR", "requests", "layers"),
            *("op_rows_LSK", "op_counts_LS", "slots", "operations"),
            *("directions_WD", "coefficients_WC", "bank_rows", "coefficients", "width"),
            *("check_layer", "scratch_HD", "rounded_HD"),
            *("layer", "hidden_TD", "residual_TD", "stream_rows"),  # these change from call to call
        )
    ]


_SIGNATURE = types.void(types.CPointer(numba.from_dtype(np.dtype(KernelCall))))

# Rows are shared out over the threads on which torch runs a model's own operations: vLLM has bound each to a core.
# Numba's would all run on the one core of the thread that starts them.
_openmp = ctypes.CDLL(None)  # torch has loaded it
_openmp.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
_openmp.GOMP_parallel.restype = None
for _name in ("omp_get_thread_num", "omp_get_num_threads"):
    llvmlite.binding.add_symbol(_name, ctypes.cast(getattr(_openmp, _name), ctypes.c_void_p).value)
_thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())
_thread_count = types.ExternalFunction("omp_get_num_threads", types.int32())


@numba.njit
def _hook(element, data):  # type: ignore[no-untyped-def]
    """Steers, captures and checks this thread's share of the planned rows of one layer.

    `residual_TD` 0 means that the layer returns one tensor. `before_LR` and `after_LR` hold the address of the layer's
    first captured row of each request, or 0. `scopes_N` 0 means that all operations act on every row with a slot, and
    `changes_NLC` 0 that no request reports changes. At the check layer, every row of a request with a slot is checked.
    """
    call = numba.carray(data, 1)[0]
    width, layer, slots, operations = call.width, call.layer, call.slots, call.operations
    has_residual = call.residual_TD != 0
    hidden_TD = _table(call.hidden_TD, (call.stream_rows, width), element)
    stream_TD = _table(call.residual_TD if has_residual else call.hidden_TD, (call.stream_rows, width), element)
    rows_N = _table(call.rows_N, (call.rows,), np.int32)
    requests_N = _table(call.requests_N, (call.rows,), np.int32)
    slots_N = _table(call.slots_N, (call.rows,), np.int32)
    capture_rows_N = _table(call.capture_rows_N, (call.rows,), np.int32)
    bad_N = _table(call.bad_N, (call.rows,), np.uint8)
    slots_R = _table(call.slots_R, (call.requests,), np.int32)
    captures_float32_R = _table(call.captures_float32_R, (call.requests,), np.uint8)
    before_R = _table(call.before_LR, (layer + 1, call.requests), np.int64)[layer]
    after_R = _table(call.after_LR, (layer + 1, call.requests), np.int64)[layer]
    op_rows_SK = _table(call.op_rows_LSK, (layer + 1, slots, operations), np.int32)[layer]
    op_counts_S = _table(call.op_counts_LS, (layer + 1, slots), np.int32)[layer]
    directions_WD = _table(call.directions_WD, (call.bank_rows, width), np.float32)
    coefficients_WC = _table(call.coefficients_WC, (call.bank_rows, call.coefficients), np.float32)
    thread = np.int64(_thread_number())
    threads = np.int64(_thread_count())  # they may be fewer than requested
    x_D = _table(call.scratch_HD, (threads, width), np.float32)[thread]
    rounded_D = _table(call.rounded_HD, (threads, width), element)[thread]
    for n in range(call.rows * thread // threads, call.rows * (thread + 1) // threads):
        row, request, slot, ordinal = rows_N[n], requests_N[n], slots_N[n], capture_rows_N[n]
        before = before_R[request] if ordinal >= 0 else np.int64(0)
        after = after_R[request] if ordinal >= 0 else np.int64(0)
        scopes = ALL_SCOPES if call.scopes_N == 0 else _table(call.scopes_N, (call.rows,), np.uint64)[n]
        is_steered = slot >= 0 and _count_acting(op_rows_SK[slot], op_counts_S[slot], coefficients_WC, scopes) > 0
        is_checked = layer == call.check_layer and slots_R[request] >= 0
        if not (is_steered or is_checked or before != 0 or after != 0):
            continue
        _read(hidden_TD[row], stream_TD[row], has_residual, x_D)
        if before != 0:
            _capture(x_D, before, ordinal, captures_float32_R[request], element)
        if is_steered:
            capped = _run_operations(x_D, op_rows_SK[slot], op_counts_S[slot], directions_WD, coefficients_WC, scopes)
            if call.changes_NLC != 0 and _table(call.reports_change_R, (call.requests,), np.uint8)[request]:
                change_C = _table(call.changes_NLC, (call.rows, call.layers, CHANGE_COLUMNS), np.float32)[n, layer]
                change_C[0] = _relative_change(hidden_TD[row], stream_TD[row], has_residual, x_D)
                change_C[1] = CAPPED if capped else ACTED
            if _round(x_D, rounded_D):
                for d in range(width):
                    stream_TD[row, d] = rounded_D[d]
                if has_residual:
                    for d in range(width):
                        hidden_TD[row, d] = 0
            else:
                bad_N[n] = BAD_VALUE
                _read(hidden_TD[row], stream_TD[row], has_residual, x_D)
        if after != 0:
            _capture(x_D, after, ordinal, captures_float32_R[request], element)
        if is_checked and not is_steered and not _round(x_D, rounded_D):
            bad_N[n] = BAD_VALUE


def _hook_float32(data):  # type: ignore[no-untyped-def]
    _hook(np.float32, data)


def _hook_bfloat16(data):  # type: ignore[no-untyped-def]
    """Widened exactly, computed in float32, rounded once."""
    _hook(np.uint16, data)


def _hook_float16(data):  # type: ignore[no-untyped-def]
    """Widened exactly, computed in float32, rounded once."""
    _hook(np.int16, data)


_KERNELS = {torch.float32: _hook_float32, torch.bfloat16: _hook_bfloat16, torch.float16: _hook_float16}

DTYPES = tuple(_KERNELS)
"""The dtypes of a residual stream that the kernel supports."""


_configuring = threading.Lock()


@functools.cache
def compiled_kernel(dtype: torch.dtype) -> Callable[[int], None]:
    """The kernel for residual streams of this dtype, compiled or from the cache; takes the address of a KernelCall."""
    sources = (sys.modules[__name__], layer_change, plan)
    compiled = from_cache(functools.partial(_compiled, _KERNELS[dtype]), sources)
    kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)
    kernel.owner = compiled  # type: ignore[attr-defined]  # the code lives as long
    return kernel


def _compiled(function: Callable[[Any], None], folder: Path | None) -> Any:
    """The compiled function, kept in `folder` and not, as by default, beside its source."""
    if folder is None:
        return numba.cfunc(_SIGNATURE)(function)
    with _configuring:
        before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder)
        try:
            return numba.cfunc(_SIGNATURE, cache=True)(function)
        finally:
            numba.config.CACHE_DIR = before


def run_on_threads(kernel: Callable[[int], None], address: int, threads: int) -> None:
    """Runs a compiled kernel on the KernelCall at this address: in this thread, or in those of torch, all at once."""
    if threads == 1:
        kernel(address)
    else:
        _openmp.GOMP_parallel(kernel, address, threads, 0)
