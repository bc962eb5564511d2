"""The tables on a GPU that its kernel reads, and the rows that it stages: filled for each step, collected after it.

The tables stay where they are on the device, so that a CUDA graph can hold their addresses. Filling them does not wait
for the device. `StepTables.collect` waits, for callers with nothing else to do meanwhile.

T: rows of the step; D: hidden size; N: rows of the plan; R: requests; L: layers; S: slots; K: operations of one layer;
W: rows of the bank; C: columns; P: pieces of captured rows.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from steer_service.core.errors import EngineFailed
from steer_service.core.layer_change import CHANGE_COLUMNS
from steer_service.ops.plan import NOT_CAPTURED, HostBank, StepPlan

LINE = 16
"""Bytes: the captured rows of a request are staged from a multiple of it. A thread writes at most this at once."""

NOTHING = -1
"""In a table: no request has this row, no slot steers it, or no row is captured."""

HEADER = 6
"""Words at the beginning of a plan: the number of its rows and of its requests, the places of the scopes (in units of 8
bytes; 0 if every operation acts on every row), of the requests and of the captures, and one that is not used. Places
are counted from the header."""

SCOPES_PLACE = 2
"""The header's word with the place of the scopes."""

CAPTURES_FLOAT32, REPORTS_CHANGE = 1, 2
"""Bits of a request's options."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BankTables:
    """A bank of programs on the device, C-contiguous; it is changed in place, between two steps."""

    op_rows_LSK: torch.Tensor
    """int32: rows of `directions_WD` and `coefficients_WC`, in the order in which they run."""
    op_counts_LS: torch.Tensor
    """int32: the number of operations per layer and slot."""
    directions_WD: torch.Tensor
    """float32: one direction per operation."""
    coefficients_WC: torch.Tensor
    """float32: coefficients per operation, see `ops.program`."""

    @classmethod
    def like(cls, host: HostBank, device: str | torch.device) -> "BankTables":
        """A copy of the host's tables."""
        return cls(**{name: torch.tensor(getattr(host, name), device=device) for name in _BANK_TABLES})

    def update(self, host: HostBank, slot: int) -> None:
        """Copies `slot` of the host's tables as it is now, after the work that is already queued on the device."""
        rows_W = np.concatenate(
            [
                rows_K[:count]
                for rows_K, count in zip(host.op_rows_LSK[:, slot], host.op_counts_LS[:, slot], strict=True)
            ]
        )
        if len(rows_W):
            places_W = _sent(rows_W.astype(np.int64), self.directions_WD.device)
            for name in ("directions_WD", "coefficients_WC"):
                getattr(self, name).index_copy_(0, places_W, _sent(getattr(host, name)[rows_W], places_W.device))
        for name in ("op_rows_LSK", "op_counts_LS"):
            of_slot = getattr(self, name)[:, slot]
            of_slot.copy_(_sent(getattr(host, name)[:, slot], of_slot.device))


_BANK_TABLES = ("op_rows_LSK", "op_counts_LS", "directions_WD", "coefficients_WC")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StagedRows:
    """The captured rows of a step, in P pieces: each has the rows of one request, layer and site.

    On the host the pieces are copied into memory of `size` bytes, one layer after the other. Within a layer they are
    as far apart as in the staging buffer.
    """

    layers_P: npt.NDArray[np.int64]
    """Layer of each piece, ascending."""
    staged_P: npt.NDArray[np.int64]
    """Place of each piece: bytes from the beginning of the staging buffer."""
    copied_P: npt.NDArray[np.int64]
    """Place of each piece in the host's copy: bytes from its beginning."""
    sizes_P: npt.NDArray[np.int64]
    """Bytes of each piece."""
    addresses_P: npt.NDArray[np.int64]
    """Address in the host's memory to which `deliver` moves each piece."""

    def __len__(self) -> int:
        return len(self.layers_P)

    @property
    def size(self) -> int:
        """Bytes of the host's copy."""
        return int((self.copied_P + self.sizes_P).max(initial=0))

    def of_layer(self, layer: int) -> "StagedRows":
        """The pieces of one layer, whose copy on the host is one of its own."""
        part = slice(*np.searchsorted(self.layers_P, [layer, layer + 1]))
        return StagedRows(
            layers_P=self.layers_P[part],
            staged_P=self.staged_P[part],
            copied_P=self.copied_P[part] - self.copied_P[part].min(initial=np.iinfo(np.int64).max),
            sizes_P=self.sizes_P[part],
            addresses_P=self.addresses_P[part],
        )

    def copy_of(self, staging: torch.Tensor, host: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Source and target of the copy: the parts of `staging` and `host` that have these pieces."""
        return staging[_span(self.staged_P, self.sizes_P)], host[_span(self.copied_P, self.sizes_P)]

    def deliver(self, host: torch.Tensor) -> None:
        """Moves the pieces from the host's copy to their addresses."""
        first = host.data_ptr()
        pieces = (self.addresses_P.tolist(), (self.copied_P + first).tolist(), self.sizes_P.tolist())
        for address, source, size in zip(*pieces, strict=True):
            ctypes.memmove(address, source, size)


def _span(firsts_P: npt.NDArray[np.int64], sizes_P: npt.NDArray[np.int64]) -> slice:
    if not len(firsts_P):
        return slice(0, 0)
    return slice(int(firsts_P[0]), int(firsts_P[-1] + sizes_P[-1]))


class StepTables:
    """The plan of a step on the device, and memory for the rows that it captures; allocated once.

    A plan is one table of int32, whose size depends on the step: one copy sends it. It begins with the report of the
    forward pass, which is sent as zeros. Then come HEADER words, and what they count or point to:

    * for each row: its request, the slot of the program that steers it, and its place among the captured rows;
    * for each row, where some operations act on some rows only: its scopes as int64, bit s for operations of scope s;
    * for each request: its slot, and its options (CAPTURES_FLOAT32, for any dtype of the model, and REPORTS_CHANGE);
    * for each layer and request: the places of its rows before and after steering in the staging buffer, in units of
      LINE bytes.
    """

    def __init__(
        self, *, rows: int, requests: int, layers: int, width: int, dtype: torch.dtype, staging: int, device: Any
    ) -> None:
        """`rows` and `requests` are the most that a step plans; `staging` is in bytes, for captured rows."""
        self._first = _even(layers + -(-rows // 4))  # the header's place in the table, which is int64 as well
        most = self._first + HEADER + _even(3 * rows) + 2 * rows + 2 * requests + 2 * layers * requests
        self._table = torch.zeros(_even(most), dtype=torch.int32, device=device)
        self.status = self._table.view(torch.uint8)[: 4 * layers + rows]
        """The report of the forward pass: `visited_L`, then `bad_T`."""
        self.visited_L = self._table[:layers]
        """1 where a layer's hook has run since the tables were filled."""
        self.bad_T = self.status[4 * layers :]
        """1 where a row went bad, see docs/numerics.md."""
        self.header = self._table[self._first :]
        """int32: the number of rows of the plan, or 0, and the rest of the table; see HEADER."""
        self.header_wide = self.header.view(torch.int64)
        """The same memory in units of the scopes."""
        self.changes_TLC = torch.zeros((rows, layers, CHANGE_COLUMNS), dtype=torch.float32, device=device)
        """Changes of the rows of requests that report them, as in `StepPlan.changes_NLC`."""
        self.staging = torch.zeros(-(-staging // LINE) * LINE, dtype=torch.uint8, device=device)
        """Captured rows of the step."""
        self.rows = rows
        """Most rows of a step."""
        self.width = width
        """Hidden size."""
        self.layers = layers
        """Decoder layers of the whole model."""
        self.dtype = dtype
        """The model's dtype, that of the residual stream."""

    def bytes_of(self, plan: StepPlan) -> npt.NDArray[np.int64]:
        """Bytes that each layer stages in a step of this plan, shape [layers]."""
        return _lines_of(plan, self.width, self.dtype)[0].sum(axis=(1, 2)) * LINE

    @property
    def report_bytes(self) -> int:
        """Bytes of the largest report of a pass, with changes; a multiple of LINE."""
        return -(-(len(self.status) + self.changes_TLC.nbytes) // LINE) * LINE

    def fill(self, plan: StepPlan, *, start: int = 0) -> StagedRows:
        """Makes the next forward pass execute this plan; returns the rows that it will stage.

        Rows are staged from byte `start`, a multiple of LINE. The rest of the buffer is left alone. Raises EngineFailed
        if the staging buffer is too small.
        """
        return self._fill(plan, lambda lines_L: lines_L.cumsum() - lines_L + start // LINE)

    def fill_by_layer(self, plan: StepPlan, starts: Sequence[int]) -> StagedRows:
        """Does what `fill` does, but captured layers use the bytes of `starts` in rotation and overwrite each other."""

        def starts_of(lines_L: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
            is_captured_L = lines_L > 0
            number_L = is_captured_L.cumsum() - is_captured_L
            return np.array(starts)[number_L % len(starts)] // LINE

        return self._fill(plan, starts_of)

    def _fill(self, plan: StepPlan, starts_of: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]) -> StagedRows:
        """`starts_of` maps the lines that each layer takes to the first line of each layer in the staging buffer."""
        lines_LRC, firsts_R, counts_R, row_bytes_R = _lines_of(plan, self.width, self.dtype)
        lines_LP = lines_LRC.reshape(len(lines_LRC), -1)
        lines_L = lines_LP.sum(axis=1)
        starts_L = starts_of(lines_L)
        needed = int((starts_L + lines_L).max()) * LINE
        if needed > len(self.staging):
            raise EngineFailed(
                f"a step captures {needed} bytes, the staging buffer holds {len(self.staging)}", reason="STAGING_FULL"
            )
        inside_LRC = (lines_LP.cumsum(axis=1) - lines_LP).reshape(lines_LRC.shape)
        staged_LRC = inside_LRC + starts_L[:, None, None]
        copied_LRC = inside_LRC + (lines_L.cumsum() - lines_L)[:, None, None]
        numbers_N = np.where(
            plan.capture_rows_N != NOT_CAPTURED, plan.capture_rows_N - firsts_R[plan.requests_N], NOTHING
        )
        self._write(plan, numbers_N.astype(np.int32), np.where(lines_LRC > 0, staged_LRC, NOTHING))
        layers_P, requests_P, sites_P = places_P = np.nonzero(lines_LRC)
        addresses_P = np.where(sites_P == 0, plan.before_LR[layers_P, requests_P], plan.after_LR[layers_P, requests_P])
        return StagedRows(
            layers_P=layers_P,
            staged_P=staged_LRC[places_P] * LINE,
            copied_P=copied_LRC[places_P] * LINE,
            sizes_P=(counts_R * row_bytes_R)[requests_P],
            addresses_P=addresses_P + (firsts_R * row_bytes_R)[requests_P],
        )

    def clear(self) -> None:
        """Makes the next forward pass do nothing."""
        self.header[:1].zero_()

    def status_of(self, plan: StepPlan) -> torch.Tensor:
        """The part of `status` that reports on the rows of a plan."""
        return self.status[: 4 * self.layers + _rows_of(plan)]

    def read_status(self, plan: StepPlan, status: torch.Tensor) -> None:
        """Writes into the plan what `status`, a copy of `status_of` in the host's memory, reports."""
        visited_L = status[: 4 * self.layers].numpy().view(np.int32) != 0
        plan.visited.update(np.flatnonzero(visited_L & plan.wanted_L).tolist())
        plan.bad_N[:] = status[4 * self.layers :].numpy()[plan.rows_N]

    def changes_of(self, plan: StepPlan) -> torch.Tensor:
        """The part of `changes_TLC` that a plan with reports fills, as bytes."""
        return self.changes_TLC[: _rows_of(plan)].view(-1).view(torch.uint8)

    def read_changes(self, plan: StepPlan, changes: torch.Tensor) -> None:
        """Writes into the plan what `changes`, a copy of `changes_of` in the host's memory, reports."""
        assert plan.changes_NLC is not None
        plan.changes_NLC[:] = changes.numpy().view(np.float32).reshape(-1, *plan.changes_NLC.shape[1:])[plan.rows_N]

    def collect(self, plan: StepPlan, staged: StagedRows) -> None:
        """Waits for the forward pass, reads its status and delivers the rows that it staged.

        Call it before the next `fill`, which clears the status and lets the next pass overwrite the rows.
        """
        self.read_status(plan, self.status_of(plan).cpu())
        if plan.changes_NLC is not None:
            self.read_changes(plan, self.changes_of(plan).cpu())
        host = torch.empty(staged.size, dtype=torch.uint8)
        source, target = staged.copy_of(self.staging, host)
        target.copy_(source)
        staged.deliver(host)

    def _write(self, plan: StepPlan, numbers_N: npt.NDArray[np.int32], offsets_LRC: npt.NDArray[np.int64]) -> None:
        """Sends the table of a plan; where some of its requests report changes, empties these first."""
        rows, requests = _rows_of(plan), len(plan.slots_R)
        scopes_place = HEADER + _even(3 * rows)
        requests_place = scopes_place + (2 * rows if plan.scopes_N is not None else 0)
        captures_place = requests_place + 2 * requests
        table = np.zeros(self._first + captures_place + offsets_LRC.size, np.int32)
        sent = table[self._first :]
        sent[:5] = rows, requests, scopes_place // 2, requests_place, captures_place
        rows_TC = sent[HEADER : HEADER + 3 * rows].reshape(rows, 3)
        rows_TC[:] = NOTHING
        rows_TC[plan.rows_N] = np.stack([plan.requests_N, plan.slots_N, numbers_N], axis=-1)
        if plan.scopes_N is None:
            sent[SCOPES_PLACE] = 0
        else:
            scopes_T = sent[scopes_place:requests_place].view(np.int64)
            scopes_T[plan.rows_N] = plan.scopes_N.view(np.int64)
        requests_RC = sent[requests_place:captures_place].reshape(requests, 2)
        requests_RC[:, 0] = plan.slots_R
        requests_RC[:, 1] = plan.captures_float32_R * CAPTURES_FLOAT32 + plan.reports_change_R * REPORTS_CHANGE
        sent[captures_place:] = offsets_LRC.reshape(-1)
        if plan.changes_NLC is not None:
            self.changes_of(plan).zero_()
        self._table[: len(table)].copy_(_pinned(table, self._table.device), non_blocking=True)


def _even(words: int) -> int:
    """At least so many words of 4 bytes, so that 8-byte numbers may follow."""
    return words + words % 2


def _rows_of(plan: StepPlan) -> int:
    """The number of a step's first rows in which those of the plan are."""
    return int(plan.rows_N.max(initial=-1)) + 1


def _lines_of(
    plan: StepPlan, width: int, dtype: torch.dtype
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Lines that each layer, request and site takes, shape [layers, requests, 2].

    Then, of each request: the place of its first captured row, the number of captured rows, and the bytes of one row.
    """
    is_captured_N = plan.capture_rows_N != NOT_CAPTURED
    captured_N = plan.requests_N[is_captured_N]
    counts_R = np.bincount(captured_N, minlength=len(plan.requests))
    firsts_R = np.full(len(plan.requests), np.iinfo(np.int32).max, np.int64)
    np.minimum.at(firsts_R, captured_N, plan.capture_rows_N[is_captured_N].astype(np.int64))
    row_bytes_R = width * np.where(plan.captures_float32_R, 4, dtype.itemsize)
    is_wanted_LRC = np.stack([plan.before_LR, plan.after_LR], axis=-1) != 0
    lines_LRC = np.where(is_wanted_LRC, -(-counts_R * row_bytes_R // LINE)[:, None], 0)
    return lines_LRC, firsts_R, counts_R, row_bytes_R


def _pinned(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """The array, from where the device can copy it without waiting; torch keeps pinned memory until that is done."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    return host.pin_memory() if device.type == "cuda" else host


def _sent(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """The array on the device; the copy is in flight."""
    return _pinned(array, device).to(device, non_blocking=True)
