"""The GPU kernel: one launch for all rows of a layer, float32 inside, the stream in model dtype outside.

One program of the grid per row of the step, padding included, and every table stays where it is on the device: what a
launch does depends on what the tables hold when it runs, so it may be recorded in a CUDA graph and replayed. Nothing
here waits for the device but `StepTables.collect`. Without Triton the module can be imported, and `tap` says what is
missing.

T: rows of the step; D: hidden size; N: rows of the plan; R: requests; L: layers; S: slots; K: operations of one layer;
W: rows of the bank; C: columns.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from steer_service.core.errors import EngineFailed, Unsupported
from steer_service.ops.plan import NOT_CAPTURED, StepPlan

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # a machine without a GPU needs none
    triton = tl = None
    constexpr = Any

LINE = 16
"""Bytes: captured rows of a request are staged from a multiple of it on, the most that a thread writes at once."""

NOTHING = -1
"""In a table: no request has this row, no slot steers it, or nothing is captured."""


def _jit(function: Callable[..., Any]) -> Any:
    """One build of a kernel serves all layers: their number is no constant in it."""
    return function if triton is None else triton.jit(function, do_not_specialize=["layer"])


# -- one row -----------------------------------------------------------------------------------------------------------


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
    """The row after one operation, whose a, b, low and high lie at `coefficients`."""
    a, b = tl.load(coefficients), tl.load(coefficients + 1)
    low, high = tl.load(coefficients + 2), tl.load(coefficients + 3)
    is_bounded = (low > float("-inf")) | (high < float("inf"))
    change = b  # p' - p = b exactly where a is 1 and there are no bounds; p need not be known
    if (a != 1.0) | is_bounded:
        p = tl.sum(x_D * direction_D, axis=0)
        clamped = tl.minimum(tl.maximum(a * p + b, low), high)
        change = tl.where(is_bounded, clamped - p, (a - 1.0) * p + b)
    return tl.where(change != 0.0, x_D + change * direction_D, x_D)


@_jit
def _is_good(x_D):  # type: ignore[no-untyped-def]
    """True if the sum of the squares is finite in float32: no NaN, no Inf, and nothing that a norm turns into one."""
    return tl.sum(x_D * x_D, axis=0) < float("inf")


@_jit
def _capture(  # type: ignore[no-untyped-def]
    x_D, offset, ordinal, is_wide, narrow, wide, offsets_D, WIDTH: constexpr, NARROW_LINE: constexpr
):
    """Stages the row as number `ordinal` of those that begin at line `offset`.

    `narrow` and `wide` are the staging buffer as elements of the stream and as float32.
    """
    inside_D = offsets_D < WIDTH
    start = ordinal.to(tl.int64) * WIDTH
    line = offset.to(tl.int64)
    if is_wide:
        tl.store(wide + line * 4 + start + offsets_D, x_D, mask=inside_D)
    else:
        stored_D = _narrowed(x_D, narrow.dtype.element_ty)
        tl.store(narrow + line * NARROW_LINE + start + offsets_D, stored_D, mask=inside_D)


# -- all rows ----------------------------------------------------------------------------------------------------------


@_jit
def _tap_kernel(  # type: ignore[no-untyped-def]
    hidden, residual, rows_TC, requests_RC, captures_LRC, bad_T, staging, staging_wide,
    op_rows_LSK, op_counts_LS, directions_WD, coefficients_WC, layer, requests, slots,
    HAS_RESIDUAL: constexpr, CHECKS: constexpr, OPERATIONS: constexpr,
    WIDTH: constexpr, BLOCK: constexpr, NARROW_LINE: constexpr,
):  # fmt: skip
    """Steers, captures and checks row `program_id(0)`; see `tap`. BLOCK is the power of 2 from WIDTH on."""
    row = tl.program_id(0)
    request = tl.load(rows_TC + row * 3)
    if request < 0:
        return
    slot = tl.load(rows_TC + row * 3 + 1)
    ordinal = tl.load(rows_TC + row * 3 + 2)
    place = layer * slots + slot
    count = tl.load(op_counts_LS + place, mask=slot >= 0, other=0)
    sites = captures_LRC + (layer * requests + request) * 2
    before = tl.load(sites, mask=ordinal >= 0, other=-1)
    after = tl.load(sites + 1, mask=ordinal >= 0, other=-1)
    is_checked = (tl.load(requests_RC + request * 2) >= 0) & CHECKS
    is_wide = tl.load(requests_RC + request * 2 + 1) != 0
    if (count == 0) & (before < 0) & (after < 0) & (is_checked == 0):
        return

    offsets_D = tl.arange(0, BLOCK)
    inside_D = offsets_D < WIDTH
    start = row.to(tl.int64) * WIDTH
    x_D = _widened(tl.load(hidden + start + offsets_D, mask=inside_D, other=0.0))
    if HAS_RESIDUAL:
        x_D += _widened(tl.load(residual + start + offsets_D, mask=inside_D, other=0.0))
    if before >= 0:
        _capture(x_D, before, ordinal, is_wide, staging, staging_wide, offsets_D, WIDTH, NARROW_LINE)

    y_D = x_D
    for k in range(count):
        op_row = tl.load(op_rows_LSK + place.to(tl.int64) * OPERATIONS + k).to(tl.int64)
        direction_D = tl.load(directions_WD + op_row * WIDTH + offsets_D, mask=inside_D, other=0.0)
        y_D = _after_operation(y_D, direction_D, coefficients_WC + op_row * 4)

    stored_D = _narrowed(y_D, hidden.dtype.element_ty)
    rounded_D = _widened(stored_D)
    is_good = _is_good(rounded_D)
    is_written = is_good & (count > 0)
    if is_written:
        if HAS_RESIDUAL:
            tl.store(residual + start + offsets_D, stored_D, mask=inside_D)
            tl.store(hidden + start + offsets_D, tl.zeros([BLOCK], hidden.dtype.element_ty), mask=inside_D)
        else:
            tl.store(hidden + start + offsets_D, stored_D, mask=inside_D)
    if (is_good == 0) & ((count > 0) | is_checked):
        tl.store(bad_T + row, 1)
    if after >= 0:
        seen_D = tl.where(is_written, rounded_D, x_D)
        _capture(seen_D, after, ordinal, is_wide, staging, staging_wide, offsets_D, WIDTH, NARROW_LINE)


# -- tables and launch -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BankTables:
    """A bank of programs on the device, C-contiguous; changed in place, between two steps."""

    op_rows_LSK: torch.Tensor
    """int32: rows of `directions_WD` and `coefficients_WC`, in the order in which they run."""
    op_counts_LS: torch.Tensor
    """int32: how many of them count."""
    directions_WD: torch.Tensor
    """float32: one direction per operation."""
    coefficients_WC: torch.Tensor
    """float32: a, b, lo, hi per operation."""


@dataclass(frozen=True, slots=True)
class StagedRows:
    """Captured rows of one request at one layer and site, and where they belong."""

    offset: int
    """Their place in the staging buffer, bytes."""
    size: int
    """Bytes."""
    address: int
    """Where `StepTables.collect` puts them, in the host's memory."""


class StepTables:
    """What is done to which row of a step, and memory for what is captured: made once, on the device."""

    def __init__(
        self, *, rows: int, requests: int, layers: int, width: int, dtype: torch.dtype, staging: int, device: str
    ) -> None:
        """For steps of at most so many rows and planned requests, with `staging` bytes for what they capture."""
        self.rows_TC = torch.full((rows, 3), NOTHING, dtype=torch.int32, device=device)
        """Request, slot of the program that steers the row, and its number among the request's captured rows."""
        self.requests_RC = torch.full((requests, 2), NOTHING, dtype=torch.int32, device=device)
        """Slot, and whether captured rows are float32 whatever the stream is."""
        self.captures_LRC = torch.full((layers, requests, 2), NOTHING, dtype=torch.int32, device=device)
        """Where a layer's rows before and after steering are staged, in units of LINE bytes."""
        self.bad_T = torch.zeros(rows, dtype=torch.uint8, device=device)
        """1 where a row went bad, see docs/numerics.md."""
        self.staging = torch.zeros(-(-staging // LINE) * LINE, dtype=torch.uint8, device=device)
        """Captured rows of the step."""
        self.width = width
        """Hidden size."""
        self.dtype = dtype
        """Of the stream."""

    def fill(self, plan: StepPlan) -> list[StagedRows]:
        """Makes the next forward pass do this plan; returns what it stages. Everything else is left alone.

        Raises EngineFailed if more is captured than the staging buffer holds.
        """
        is_captured_N = plan.capture_rows_N != NOT_CAPTURED
        captured_N, ordinals_N = plan.requests_N[is_captured_N], plan.capture_rows_N[is_captured_N].astype(np.int64)
        counts_R = np.bincount(captured_N, minlength=len(plan.requests))
        firsts_R = np.full(len(plan.requests), np.iinfo(np.int64).max)
        np.minimum.at(firsts_R, captured_N, ordinals_N)
        row_bytes_R = self.width * np.where(plan.wide_R, 4, self.dtype.itemsize)
        addresses_LRC = np.stack([plan.before_LR, plan.after_LR], axis=-1)
        lines_LRC = np.where(addresses_LRC != 0, -(-counts_R * row_bytes_R // LINE)[:, None], 0)
        offsets_LRC = np.where(lines_LRC > 0, lines_LRC.cumsum().reshape(lines_LRC.shape) - lines_LRC, NOTHING)
        if lines_LRC.sum() * LINE > len(self.staging):
            raise EngineFailed(
                f"a step captures {lines_LRC.sum() * LINE} bytes, the staging buffer holds {len(self.staging)}",
                reason="STAGING_FULL",
            )
        numbers_N = np.full_like(plan.capture_rows_N, NOTHING)
        numbers_N[is_captured_N] = ordinals_N - firsts_R[captured_N]
        self._write(plan, numbers_N, offsets_LRC)
        return [
            StagedRows(
                offset=int(offsets_LRC[layer, request, site]) * LINE,
                size=int(counts_R[request] * row_bytes_R[request]),
                address=int(addresses_LRC[layer, request, site] + firsts_R[request] * row_bytes_R[request]),
            )
            for layer, request, site in np.argwhere(lines_LRC > 0)
        ]

    def clear(self) -> None:
        """Makes the next forward pass do nothing."""
        self.rows_TC.fill_(NOTHING)
        self.bad_T.zero_()

    def collect(self, plan: StepPlan, staged: Sequence[StagedRows]) -> None:
        """Waits for the forward pass, notes its bad rows in the plan and puts what it staged where it belongs.

        Comes before the next `fill`, which clears the one and lets the next pass write over the other.
        """
        plan.bad_N[:] = self.bad_T.cpu().numpy()[plan.rows_N]
        if staged:
            bytes_ = self.staging[: staged[-1].offset + staged[-1].size].cpu()
            for part in staged:
                ctypes.memmove(part.address, bytes_.data_ptr() + part.offset, part.size)

    def _write(self, plan: StepPlan, numbers_N: npt.NDArray[np.int32], offsets_LRC: npt.NDArray[np.int64]) -> None:
        rows_TC = np.full(self.rows_TC.shape, NOTHING, np.int32)
        rows_TC[plan.rows_N] = np.stack([plan.requests_N, plan.slots_N, numbers_N], axis=-1)
        requests_RC = np.stack([plan.slots_R, plan.wide_R], axis=-1).astype(np.int32)
        _copy(rows_TC, self.rows_TC)
        _copy(requests_RC, self.requests_RC[: len(requests_RC)])
        _copy(offsets_LRC.astype(np.int32), self.captures_LRC[:, : len(requests_RC)])
        self.bad_T.zero_()


def tap(
    hidden_TD: torch.Tensor,
    residual_TD: torch.Tensor | None,
    layer: int,
    bank: BankTables,
    step: StepTables,
    *,
    checks: bool,
) -> None:
    """Steers and captures the rows of one layer in place, as `step` says, with one kernel on the current stream.

    `residual_TD` is None where the layer returns one tensor. With `checks`, every row of a request with a slot is
    looked at. Bad rows are left unsteered and flagged in `step.bad_T`. Raises Unsupported without Triton.
    """
    if triton is None:
        raise Unsupported("the GPU kernel needs Triton, which is not installed", reason="TRITON_MISSING")
    rows, width = hidden_TD.shape
    for tensor_TD in (hidden_TD,) if residual_TD is None else (hidden_TD, residual_TD):
        assert tensor_TD.is_contiguous(), "the kernel counts on contiguous rows"
        assert (tensor_TD.dtype, tensor_TD.shape) == (step.dtype, (rows, step.width)), "not the stream of the tables"
    assert rows <= len(step.rows_TC), f"{rows} rows, the tables hold {len(step.rows_TC)}"
    if rows == 0:
        return
    _tap_kernel[(rows,)](
        hidden_TD,
        hidden_TD if residual_TD is None else residual_TD,
        step.rows_TC,
        step.requests_RC,
        step.captures_LRC,
        step.bad_T,
        step.staging.view(step.dtype),
        step.staging.view(torch.float32),
        bank.op_rows_LSK,
        bank.op_counts_LS,
        bank.directions_WD,
        bank.coefficients_WC,
        layer,
        len(step.requests_RC),
        bank.op_counts_LS.shape[1],
        HAS_RESIDUAL=residual_TD is not None,
        CHECKS=checks,
        OPERATIONS=bank.op_rows_LSK.shape[2],
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        NARROW_LINE=LINE // step.dtype.itemsize,
        num_warps=warps_for(width),
    )


def warps_for(width: int) -> int:
    """Warps that share a row: at most 32 elements for each of their threads, up to the 32 warps that a GPU allows."""
    return min(max(triton.next_power_of_2(width) // 1024, 4), 32)


def _copy(array: npt.NDArray[Any], table: torch.Tensor) -> None:
    """Copies to the device without waiting for it; torch keeps the pinned memory until the copy has been made."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    table.copy_(host.pin_memory() if table.is_cuda else host, non_blocking=True)
