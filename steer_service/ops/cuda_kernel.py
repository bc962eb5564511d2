"""The GPU kernel: one launch for all rows of a layer, float32 inside, the residual stream in model dtype outside.

The grid has one program per row of the step, padding included. What a launch does depends only on what the tables of
`ops.cuda_tables` hold when it runs. So a launch can be recorded in a CUDA graph and replayed. A launch does not wait
for the device. Without Triton the module can be imported, and `steer_and_capture` raises Unsupported.

T: rows of the step; D: hidden size; R: requests; L: layers; S: slots; K: operations of one layer; W: rows of the bank;
C: columns.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from steer_service.core.errors import EngineFailed, Unsupported
from steer_service.ops.cuda_tables import HEADER, LINE, BankTables, StepTables
from steer_service.ops.stream_check import check_stream

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # a machine without a GPU needs none
    triton = tl = None
    constexpr = Any


def _jit(function: Callable[..., Any]) -> Any:
    """Compiles a kernel once for all layers: the layer is not a constant in it."""
    return function if triton is None else triton.jit(function, do_not_specialize=["layer"])


@_jit
def _widened(stored):  # type: ignore[no-untyped-def]
    """Stored elements as float32."""
    if stored.dtype == tl.bfloat16:
        wide = (stored.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = stored.to(tl.float32)
    return wide


@_jit
def _narrowed(number, element: constexpr):  # type: ignore[no-untyped-def]
    """Float32 as elements to be stored, ties to even; every NaN becomes a quiet one."""
    if element == tl.bfloat16:  # as bits: Triton's interpreter truncates, and GPUs before Ampere have no instruction
        bits = number.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        stored = tl.where(is_nan, 0x7FC0, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        stored = number.to(element)
    return stored


@_jit
def _after_operation(x_D, direction_D, coefficients):  # type: ignore[no-untyped-def]
    """The row after one operation, and 1 if its projection was outside of the operation's bounds.

    The coefficients of the operation are at this address, in the order of `ops.program`.
    """
    a, b = tl.load(coefficients), tl.load(coefficients + 1)
    low, high = tl.load(coefficients + 2), tl.load(coefficients + 3)
    is_relative, limit = tl.load(coefficients + 5) != 0.0, tl.load(coefficients + 6)
    keeps_norm, is_limited = tl.load(coefficients + 7) != 0.0, limit < float("inf")
    norm = 1.0
    if is_relative | is_limited | keeps_norm:
        norm = tl.sqrt(tl.sum(x_D * x_D, axis=0))
    is_bounded = (low > float("-inf")) | (high < float("inf"))
    change = tl.where(is_relative, b * norm, b)  # p' - p exactly where a is 1 and there are no bounds
    is_capped = 0
    if (a != 1.0) | is_bounded:
        p = tl.sum(x_D * direction_D, axis=0)
        clamped = tl.minimum(tl.maximum(a * p + b, low), high)
        change = tl.where(is_bounded, clamped - p, (a - 1.0) * p + b)
        is_capped = (is_bounded & (clamped != p)).to(tl.int32)
    if is_limited:
        clipped = tl.minimum(tl.maximum(change, -limit * norm), limit * norm)
        change = tl.where(norm < float("inf"), clipped, float("nan"))  # without a norm there is no limit: a bad row
    y_D = tl.where(change != 0.0, x_D + change * direction_D, x_D)
    if keeps_norm & (change != 0.0):
        now = tl.sqrt(tl.sum(y_D * y_D, axis=0))
        factor = tl.where(now < float("inf"), norm / now, float("nan"))  # zeros become NaN if x was not zero
        y_D = y_D * tl.where((norm == 0.0) & (now == 0.0), 1.0, factor)
    return y_D, is_capped


@_jit
def _relative_change(x_D, y_D):  # type: ignore[no-untyped-def]
    """|y - x| / |x|; NaN if x is zeros."""
    norm, moved = tl.sqrt(tl.sum(x_D * x_D, axis=0)), tl.sqrt(tl.sum((y_D - x_D) * (y_D - x_D), axis=0))
    return tl.where(norm > 0.0, moved / tl.where(norm > 0.0, norm, 1.0), float("nan"))


@_jit
def _is_good(x_D):  # type: ignore[no-untyped-def]
    """True if the sum of the squares is finite in float32: no NaN or Inf, and a norm makes none."""
    return tl.sum(x_D * x_D, axis=0) < float("inf")


@_jit
def _capture(  # type: ignore[no-untyped-def]
    x_D, offset, ordinal, captures_float32, narrow, wide, offsets_D, WIDTH: constexpr, NARROW_LINE: constexpr
):
    """Stages the row at place `ordinal` of the rows that begin at line `offset`.

    `narrow` and `wide` are the staging buffer in the model's dtype and in float32.
    """
    inside_D = offsets_D < WIDTH
    start = ordinal.to(tl.int64) * WIDTH
    line = offset.to(tl.int64)
    if captures_float32:
        tl.store(wide + line * 4 + start + offsets_D, x_D, mask=inside_D)
    else:
        stored_D = _narrowed(x_D, narrow.dtype.element_ty)
        tl.store(narrow + line * NARROW_LINE + start + offsets_D, stored_D, mask=inside_D)


@_jit
def _hook_kernel(  # type: ignore[no-untyped-def]
    hidden, residual, header, header_wide, bad_T, visited_L, changes_TLC, staging, staging_wide,
    op_rows_LSK, op_counts_LS, directions_WD, coefficients_WC, layer, slots, layers,
    HAS_RESIDUAL: constexpr, CHECKS: constexpr, OPERATIONS: constexpr, ROWS: constexpr,
    COEFFICIENTS: constexpr, WIDTH: constexpr, BLOCK: constexpr, NARROW_LINE: constexpr,
):  # fmt: skip
    """`steer_and_capture` for row `program_id(0)`. WIDTH is the hidden size, BLOCK the next power of 2.

    `header` is a step's plan, see `StepTables`; its rows begin at place ROWS.
    """
    row = tl.program_id(0)
    if row == 0:
        tl.store(visited_L + layer, 1)
    if row >= tl.load(header):
        return
    row_C = header + ROWS + row * 3
    request = tl.load(row_C)
    if request < 0:
        return
    slot = tl.load(row_C + 1)
    ordinal = tl.load(row_C + 2)
    place = layer * slots + slot
    count = tl.load(op_counts_LS + place, mask=slot >= 0, other=0)
    requests, scopes_place = tl.load(header + 1), tl.load(header + 2)
    request_C = header + tl.load(header + 3) + request * 2
    sites = header + tl.load(header + 4) + (layer * requests + request) * 2
    before = tl.load(sites, mask=ordinal >= 0, other=-1)
    after = tl.load(sites + 1, mask=ordinal >= 0, other=-1)
    is_checked = (tl.load(request_C) >= 0) & CHECKS
    options = tl.load(request_C + 1)
    captures_float32 = (options & 1) != 0
    if (count == 0) & (before < 0) & (after < 0) & (is_checked == 0):
        return

    offsets_D = tl.arange(0, BLOCK)
    inside_D = offsets_D < WIDTH
    start = row.to(tl.int64) * WIDTH
    x_D = _widened(tl.load(hidden + start + offsets_D, mask=inside_D, other=0.0))
    if HAS_RESIDUAL:
        x_D += _widened(tl.load(residual + start + offsets_D, mask=inside_D, other=0.0))
    if before >= 0:
        _capture(x_D, before, ordinal, captures_float32, staging, staging_wide, offsets_D, WIDTH, NARROW_LINE)

    y_D = x_D
    scopes = tl.load(header_wide + scopes_place + row, mask=scopes_place > 0, other=-1)
    acting = 0  # operations that act on this row
    capped = 0  # caps that moved it
    for k in range(count):
        op_row = tl.load(op_rows_LSK + place.to(tl.int64) * OPERATIONS + k).to(tl.int64)
        coefficients = coefficients_WC + op_row * COEFFICIENTS
        scope = tl.load(coefficients + 4).to(tl.int64)
        if ((scopes >> scope) & 1) != 0:
            acting += 1
            direction_D = tl.load(directions_WD + op_row * WIDTH + offsets_D, mask=inside_D, other=0.0)
            y_D, is_capped = _after_operation(y_D, direction_D, coefficients)
            capped += is_capped
    if (acting > 0) & ((options & 2) != 0):  # the request reports changes, see `core.layer_change`
        change = changes_TLC + (row.to(tl.int64) * layers + layer) * 2
        tl.store(change, _relative_change(x_D, y_D))
        tl.store(change + 1, tl.where(capped > 0, 2.0, 1.0))

    stored_D = _narrowed(y_D, hidden.dtype.element_ty)
    rounded_D = _widened(stored_D)
    is_good = _is_good(rounded_D)
    is_written = is_good & (acting > 0)
    if is_written:
        if HAS_RESIDUAL:
            tl.store(residual + start + offsets_D, stored_D, mask=inside_D)
            tl.store(hidden + start + offsets_D, tl.zeros([BLOCK], hidden.dtype.element_ty), mask=inside_D)
        else:
            tl.store(hidden + start + offsets_D, stored_D, mask=inside_D)
    if (is_good == 0) & ((acting > 0) | is_checked):
        tl.store(bad_T + row, 1)
    if after >= 0:
        seen_D = tl.where(is_written, rounded_D, x_D)
        _capture(seen_D, after, ordinal, captures_float32, staging, staging_wide, offsets_D, WIDTH, NARROW_LINE)


def steer_and_capture(
    hidden_TD: torch.Tensor,
    residual_TD: torch.Tensor | None,
    layer: int,
    bank: BankTables,
    step: StepTables,
    *,
    checks: bool,
) -> None:
    """Steers and captures the rows of one layer in place, as `step` says, with one kernel on the current CUDA stream.

    `residual_TD` is None where the layer returns one tensor. With `checks`, every row of a request with a slot is
    checked. Bad rows are left unsteered and flagged in `step.bad_T`. Raises Unsupported without Triton, and
    EngineFailed for tensors that are not the residual stream of the tables.
    """
    if triton is None:
        raise Unsupported("the GPU kernel needs Triton, which is not installed", reason="TRITON_MISSING")
    rows, width = hidden_TD.shape
    for tensor_TD in (hidden_TD,) if residual_TD is None else (hidden_TD, residual_TD):
        check_stream(tensor_TD, step.dtype, (rows, width), 0, step.width)
    if rows > step.rows:
        raise EngineFailed(f"a layer returned {rows} rows, the tables hold {step.rows}", reason="WRONG_STREAM")
    if rows == 0:
        return
    _hook_kernel[(rows,)](
        hidden_TD,
        hidden_TD if residual_TD is None else residual_TD,
        step.header,
        step.header_wide,
        step.bad_T,
        step.visited_L,
        step.changes_TLC,
        step.staging.view(step.dtype),
        step.staging.view(torch.float32),
        bank.op_rows_LSK,
        bank.op_counts_LS,
        bank.directions_WD,
        bank.coefficients_WC,
        layer,
        bank.op_counts_LS.shape[1],
        step.layers,
        HAS_RESIDUAL=residual_TD is not None,
        CHECKS=checks,
        OPERATIONS=bank.op_rows_LSK.shape[2],
        ROWS=HEADER,
        COEFFICIENTS=bank.coefficients_WC.shape[1],
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        NARROW_LINE=LINE // step.dtype.itemsize,
        num_warps=warps_for(width, lanes_of(hidden_TD.device)),
    )


def warps_for(width: int, lanes: int = 32) -> int:
    """Warps of so many `lanes` that share a row of `width` elements: a thread for 32 of them, at most 1024 threads."""
    return min(max(triton.next_power_of_2(width) // (32 * lanes), 4), 1024 // lanes)


@cache
def lanes_of(device: torch.device) -> int:
    """Threads of a warp: 32 on GPUs of NVIDIA, and 64 on some of AMD's, whose warps are called wavefronts."""
    if device.type != "cuda":
        return 32
    return int(getattr(torch.cuda.get_device_properties(device), "warp_size", 32))
