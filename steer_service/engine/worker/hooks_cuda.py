"""Hooks on a GPU: tables at fixed addresses, one kernel per layer, and captures copied while the model continues.

Every launch has the same arguments, so that a CUDA graph can hold it. What a launch does depends on the tables. They
are filled before a forward pass and cleared after it: profiling, graph recording and idle steps find them empty.
Everything that touches the tables is queued on the model's CUDA stream, in order.

Captured rows are staged on the device and copied to the host while the model continues. Only `collect`, which reads the
results of one forward pass, waits for the device. The staging buffer is a double buffer: forward passes alternate
between its halves. If a half must be overwritten before it was copied, the device waits, not the host. A forward pass
that needs more than one half gets both. Every forward pass that a graph replays fits into the buffer: dispatch.py lets
no graph replay one that may not. Such a pass has its hooks called one by one: its layers alternate between the halves,
and each layer is copied while the next one runs.
"""

import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from steer_service.core.capture import CaptureSite
from steer_service.core.errors import EngineFailed, Unsupported
from steer_service.engine.worker.dummy_run import PROOF_ROWS
from steer_service.engine.worker.hooks import HookContext, use_step
from steer_service.engine.worker.kernel_proof import rows_at_once
from steer_service.ops.copy_stream import Copy, CopyEvent, copy_stream_for
from steer_service.ops.cuda_kernel import steer_and_capture
from steer_service.ops.cuda_tables import LINE, BankTables, StagedRows, StepTables
from steer_service.ops.pinned_ring import PinnedRing, RingPart
from steer_service.ops.plan import StepPlan
from steer_service.ops.stream_check import check_stream

MOST_STAGED = (1 << 31) * LINE
"""Bytes of a staging buffer: its places are counted in lines, as int32."""

REPORTS = 4
"""Reports of passes for which the host has memory; vLLM has no more steps in flight than two."""


class CudaHooks:
    """Hooks whose tables are on the device; in tests the device is a CPU, where Triton interprets the kernel."""

    completes_later = True

    def __init__(self, context: HookContext, *, staging: int | None = None, pinned: int | None = None) -> None:
        """Raises Unsupported (STAGING_TOO_SMALL) if the context asks for too small a staging buffer.

        For tests: `staging`, bytes of the staging buffer; `pinned`, of the host's memory for copies. By default
        `staging_bytes`, and room for all that the staging buffer holds.
        """
        self.dtype = getattr(torch, context.dtype)
        self.context = context
        self.copies = copy_stream_for(context.device)
        self.tables = StepTables(
            rows=max(context.rows, context.recorded_rows),
            requests=context.requests,
            layers=context.layer_count,
            width=context.hidden_size,
            dtype=self.dtype,
            staging=staging_bytes(context) if staging is None else staging,
            device=context.device,
        )
        self.rows_ring = PinnedRing(self.copies.pinned_buffer(len(self.tables.staging) if pinned is None else pinned))
        self.report_ring = PinnedRing(self.copies.pinned_buffer(REPORTS * self.tables.report_bytes))
        self.staging_bytes = len(self.tables.staging)
        self.pinned_bytes = self.rows_ring.size + self.report_ring.size
        self.graph_bytes: int | None = staging_bytes(replace(context, writes_rows=True))
        self._bank_tables = BankTables.like(context.bank, context.device)
        self._half = len(self.tables.staging) // 2 // LINE * LINE
        self._last_half = 1
        self._copying: dict[int, CopyEvent] = {}  # half -> the copy that must finish before it is overwritten
        self._idle_hooks = IdleHooks(self)
        self._compile()
        self.clear_tables()

    def sync_slot(self, slot: int) -> None:
        """Copies the slot's program to the device, after the steps that still need the old one."""
        self._bank_tables.update(self.context.bank, slot)

    def begin(self, plan: StepPlan, *, by_layer: bool = False) -> "CudaForward":
        """Fills the tables, after the forward passes that still read them."""
        sizes_L = self.tables.bytes_of(plan)
        forward: CudaForward
        if by_layer or sizes_L.sum() > len(self.tables.staging):
            schedule = [(0,), (1,)] if sizes_L.max() <= self._half else [(0, 1)]
            staged = self.tables.fill_by_layer(plan, [halves[0] * self._half for halves in schedule])
            forward = LayerwiseCudaForward(self, plan, staged, schedule)
        else:
            halves = self._halves_for(int(sizes_L.sum()))
            forward = CudaForward(self, plan, self.tables.fill(plan, start=min(halves, default=0) * self._half), halves)
            self.acquire_buffer(halves)
        use_step(forward)
        return forward

    def _halves_for(self, size: int) -> tuple[int, ...]:
        """The halves for a forward pass that stages `size` bytes."""
        if size == 0 or size > self._half:
            return (0, 1) if size else ()
        self._last_half = 1 - self._last_half
        return (self._last_half,)

    def acquire_buffer(self, halves: Sequence[int]) -> None:
        """Lets the device's next work overwrite these halves of the staging buffer."""
        for half in halves:
            event = self._copying.pop(half, None)
            if event is not None:
                self.copies.make_device_wait_for(event)

    def send(self, status: Sequence[Copy], rows: Sequence[Copy], halves: Sequence[int] = ()) -> CopyEvent:
        """Copies the status before the tables are cleared, and captured rows of these halves during later work."""
        event = self.copies.send(status, rows)
        self._copying.update(dict.fromkeys(halves, event))
        return event

    def launch(self, hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, layer: int) -> None:
        """Launches the kernel on the current CUDA stream."""
        checks = layer == self.context.layers[-1]
        steer_and_capture(hidden_TD, residual_TD, layer, self._bank_tables, self.tables, checks=checks)

    def clear_tables(self) -> None:
        """Clears the tables after the work launched so far. Later hooks act only while a graph is recorded."""
        self.tables.clear()
        use_step(self._idle_hooks)

    def _compile(self) -> None:
        """Makes Triton compile the kernel now, since it must not compile while a graph is recorded."""
        hidden_TD = torch.zeros(1, self.context.hidden_size, dtype=self.dtype, device=self.context.device)
        for layer in {self.context.layers[0], self.context.layers[-1]}:
            self.launch(hidden_TD, None, layer)
            self.launch(hidden_TD, hidden_TD.clone(), layer)


class IdleHooks:
    """Stands for a forward pass without a plan, so that every graph records all hooks."""

    def __init__(self, hooks: CudaHooks) -> None:
        self.wanted_L = np.ones(hooks.context.layer_count, bool)
        self._hooks = hooks

    def visit(self, hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, layer: int) -> None:
        """Launches the kernel if a graph is being recorded; otherwise the tables are empty."""
        if self._hooks.copies.is_recording:
            self._hooks.launch(hidden_TD, residual_TD, layer)


class CudaForward:
    """One forward pass with filled tables."""

    def __init__(self, hooks: CudaHooks, plan: StepPlan, staged: StagedRows, halves: Sequence[int]) -> None:
        """`halves`: halves of the staging buffer for its captured rows."""
        self.plan = plan
        self.wanted_L = plan.wanted_L
        self._hooks = hooks
        self._staged = staged
        self._halves = halves
        self._arrival: CopyEvent | None = None
        self._has_arrived = False
        self._emptying = threading.RLock()
        status = len(hooks.tables.status_of(plan))
        changes = len(hooks.tables.changes_of(plan)) if plan.changes_NLC is not None else 0
        self._report = hooks.report_ring.take(status + changes, self._read_report)
        self._status, self._changes = self._report.memory[:status], self._report.memory[status:]
        self._rows = self._take_rows()
        self._rows_needed = int(plan.rows_N.max(initial=-1)) + 1
        self._collecting = threading.Lock()
        self._is_collected = False

    def visit(self, hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, layer: int) -> None:
        """Launches the kernel; called if no graph is replayed."""
        for tensor_TD in (hidden_TD,) if residual_TD is None else (hidden_TD, residual_TD):
            check_stream(
                tensor_TD, self._hooks.dtype, tuple(hidden_TD.shape), self._rows_needed, self._hooks.context.hidden_size
            )
        self._hooks.launch(hidden_TD, residual_TD, layer)

    def end(self) -> None:
        """Queues the copies of the status and the staged rows, then clears the tables."""
        self._arrival = self._send()
        self._hooks.clear_tables()

    def _send(self) -> CopyEvent:
        rows = [self._copy_of(self._staged, self._rows)] if self._rows is not None else []
        return self._hooks.send(self._copies_of_status(), rows, self._halves)

    def _copies_of_status(self) -> list[Copy]:
        tables = self._hooks.tables
        status = [(tables.status_of(self.plan), self._status)]
        return [*status, (tables.changes_of(self.plan), self._changes)] if len(self._changes) else status

    def _take_rows(self) -> RingPart | None:
        """The host's memory for all staged rows."""
        return self._hooks.rows_ring.take(self._staged.size, self._deliver) if len(self._staged) else None

    def _copy_of(self, staged: StagedRows, part: RingPart) -> Copy:
        return staged.copy_of(self._hooks.tables.staging, part.memory)

    def discard(self) -> None:
        """Clears the tables."""
        self._is_collected = True
        self._hooks.clear_tables()
        self._free()

    def collect(self) -> None:
        """Waits for the copies and reads them."""
        with self._collecting:
            if self._is_collected:
                return
            self._read_report()
            self._check_copied()
            self._deliver()
            self._is_collected = True

    def _read_report(self) -> None:
        """Waits for the report and reads it; done once, by whoever collects the pass or needs the memory."""
        with self._emptying:
            if self._report.is_free:
                return
            self._wait()
            self._hooks.tables.read_status(self.plan, self._status)
            if len(self._changes):
                self._hooks.tables.read_changes(self.plan, self._changes)
            self._hooks.report_ring.free(self._report)

    def _deliver(self) -> None:
        """Waits for the rows and moves them to their places, likewise once."""
        with self._emptying:
            if self._rows is None or self._rows.is_free:
                return
            self._wait()
            self._staged.deliver(self._rows.memory)
            self._hooks.rows_ring.free(self._rows)

    def _wait(self) -> None:
        """Waits for the copies of the pass, which has ended: a pass ends before the next one begins."""
        assert self._arrival is not None
        if not self._has_arrived:
            self._arrival.synchronize()
            self._has_arrived = True

    def _free(self) -> None:
        self._hooks.report_ring.free(self._report)
        if self._rows is not None:
            self._hooks.rows_ring.free(self._rows)

    def _check_copied(self) -> None:
        """Does nothing: all rows were copied at once."""


class LayerwiseCudaForward(CudaForward):
    """A forward pass that stages more than the buffer holds; each layer is copied before it is overwritten."""

    def __init__(
        self, hooks: CudaHooks, plan: StepPlan, staged: StagedRows, schedule: Sequence[tuple[int, ...]]
    ) -> None:
        """`schedule`: halves of the staging buffer that its captured layers use in turn."""
        self._layer_parts: dict[int, tuple[RingPart, CopyEvent]] = {}
        super().__init__(hooks, plan, staged, ())
        layers = np.unique(staged.layers_P).tolist()
        self._halves_of = {layer: schedule[number % len(schedule)] for number, layer in enumerate(layers)}
        self._copied: set[int] = set()

    def visit(self, hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, layer: int) -> None:
        """Launches the kernel, and the copy of the rows that it stages."""
        halves = self._halves_of.get(layer, ())
        self._hooks.acquire_buffer(halves)
        super().visit(hidden_TD, residual_TD, layer)
        if halves:
            staged = self._staged.of_layer(layer)
            part = self._hooks.rows_ring.take(staged.size, lambda: self._deliver_layer(layer))
            event = self._hooks.send([], [self._copy_of(staged, part)], halves)
            self._layer_parts[layer] = part, event
            self._copied.add(layer)

    def _take_rows(self) -> None:
        """None: each layer has a part of its own, once it runs."""

    def _deliver(self) -> None:
        for layer in list(self._layer_parts):
            self._deliver_layer(layer)

    def _deliver_layer(self, layer: int) -> None:
        with self._emptying:
            if layer in self._layer_parts:
                part, event = self._layer_parts.pop(layer)
                if not self._has_arrived:
                    event.synchronize()
                self._staged.of_layer(layer).deliver(part.memory)
                self._hooks.rows_ring.free(part)

    def _free(self) -> None:
        super()._free()
        for part, _ in self._layer_parts.values():
            self._hooks.rows_ring.free(part)

    def _send(self) -> CopyEvent:
        return self._hooks.send(self._copies_of_status(), [])  # arrives after the copies of the layers

    def _check_copied(self) -> None:
        lost = sorted(set(self._halves_of) - self._copied)
        if lost:
            raise EngineFailed(
                f"a step captured more than the staging buffer holds, and the rows of layers {lost} were not "
                "copied in time: a CUDA graph was replayed that is larger than any announced one",
                reason="STAGING_FULL",
            )


def staging_bytes(context: HookContext) -> int:
    """Size of the staging buffer in bytes; raises Unsupported for one that is too small.

    By default it holds the rows of the largest graph at all layers and one site, in the model's dtype, or what it must
    hold at least. It has the same size on all ranks that write rows, for steps to run in the same way on all. On
    a rank that does not write them, it holds what the self-test captures: up to PROOF_ROWS rows at all layers, and the
    rows of the kernel's proof at one.
    """
    width = context.hidden_size * getattr(torch, context.dtype).itemsize
    proof = max(
        _bytes_of(context.stage_layers, min(PROOF_ROWS, context.requests, context.rows), width),
        _bytes_of(len(CaptureSite), rows_at_once(context), context.hidden_size * 4),
    )
    if not context.writes_rows:
        return proof
    least = max(proof, _layer_bytes(context))
    if max(least, context.staging_bytes) > MOST_STAGED:
        raise Unsupported(
            f"captured rows would need {max(least, context.staging_bytes)} bytes of the GPU, at most {MOST_STAGED} can "
            "be addressed; lower steer_staging_bytes or max_num_batched_tokens",
            reason="STAGING_TOO_LARGE",
        )
    if context.staging_bytes == 0:
        requests = min(context.requests, context.recorded_rows)
        wanted = _bytes_of(context.stage_layers, context.recorded_rows, width, requests)
        return min(max(least, wanted), MOST_STAGED)
    if context.staging_bytes < least:
        raise Unsupported(
            f"steer_staging_bytes: {context.staging_bytes} bytes do not hold what one layer of the largest step may "
            f"capture: {least} bytes for max_num_batched_tokens={context.rows}",
            reason="STAGING_TOO_SMALL",
        )
    return context.staging_bytes


def _layer_bytes(context: HookContext) -> int:
    """Bytes of one layer of the largest step, both sites, in float32."""
    return _bytes_of(len(CaptureSite), context.rows, context.hidden_size * 4, min(context.requests, context.rows))


def _bytes_of(pieces: int, rows: int, row_bytes: int, requests: int | None = None) -> int:
    """Bytes of the rows of so many requests (None: one for each row), so many times."""
    return pieces * (rows * row_bytes + (rows if requests is None else requests) * LINE)
