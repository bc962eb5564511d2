"""Hooks on a GPU: tables at fixed addresses, one kernel per layer, and captures copied while the model continues.

Every launch has the same arguments, so that a CUDA graph can hold it. What a launch does depends on the tables. They
are filled before a forward pass and cleared after it: profiling, graph recording and idle steps find them empty.
Everything that touches the tables is queued on the model's CUDA stream, in order.

Captured rows are staged on the device and copied to the host beside the model's work. Only `collect`, which reads what
one pass left, waits for the device. The staging buffer is a double buffer: passes alternate between its halves. If a
half must be overwritten before it was copied, the device waits, not the host. A pass that needs more than one half gets
both. Every pass that a graph replays fits. A pass that does not fit has its hooks called one by one: its layers
alternate between the halves, and each layer is copied while the next one runs.
"""

import threading
from collections.abc import Sequence

import numpy as np
import torch

from steer_service.core.errors import EngineFailed
from steer_service.engine.worker.hooks import HookContext, check_stream, use_step
from steer_service.ops.copy_stream import Copy, CopyEvent, copy_stream_for
from steer_service.ops.cuda_kernel import steer_and_capture
from steer_service.ops.cuda_tables import LINE, BankTables, StagedRows, StepTables
from steer_service.ops.plan import StepPlan

SITES = 2
"""Before steering, and after."""


class CudaHooks:
    """Hooks whose tables are on the device; in tests the device is a CPU, where Triton interprets the kernel."""

    completes_later = True

    def __init__(self, context: HookContext, *, staging: int | None = None) -> None:
        """`staging` is for tests; the bytes are otherwise those of `staging_bytes`."""
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
        self._bank_tables = BankTables.like(context.bank, context.device)
        self._half = len(self.tables.staging) // 2 // LINE * LINE
        self._last_half = 1
        self._copying: dict[int, CopyEvent] = {}  # half -> what is to arrive before it is written over
        self._idle_hooks = IdleHooks(self)
        self._compile()
        self.clear_tables()

    def sync_slot(self, slot: int) -> None:
        """Copies what the slot holds to the device, behind the steps that still need what it held."""
        self._bank_tables.update(self.context.bank, slot)

    def begin(self, plan: StepPlan) -> "CudaForward":
        """Fills the tables, behind the passes that still read them."""
        sizes_L = self.tables.bytes_of(plan)
        forward: CudaForward
        if sizes_L.sum() > len(self.tables.staging):
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
        """Those for a pass that stages so much at once."""
        if size == 0 or size > self._half:
            return (0, 1) if size else ()
        self._last_half = 1 - self._last_half
        return (self._last_half,)

    def acquire_buffer(self, halves: Sequence[int]) -> None:
        """What the device does from now on may write over these halves of the staging buffer."""
        for half in halves:
            event = self._copying.pop(half, None)
            if event is not None:
                self.copies.make_device_wait_for(event)

    def send(self, status: Sequence[Copy], rows: Sequence[Copy], halves: Sequence[int] = ()) -> CopyEvent:
        """Copies the status before the tables are cleared, and captured rows from these halves beside later work."""
        event = self.copies.send(status, rows)
        self._copying.update(dict.fromkeys(halves, event))
        return event

    def launch(self, hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, layer: int) -> None:
        """The kernel, on the current stream."""
        checks = layer == self.context.layers[-1]
        steer_and_capture(hidden_TD, residual_TD, layer, self._bank_tables, self.tables, checks=checks)

    def clear_tables(self) -> None:
        """Empties the tables behind what was launched; hooks called from now on do nothing unless they are recorded."""
        self.tables.clear()
        use_step(self._idle_hooks)

    def _compile(self) -> None:
        """Lets Triton compile now: it must not while a graph is recorded."""
        stream_TD = torch.zeros(1, self.context.hidden_size, dtype=self.dtype, device=self.context.device)
        for layer in {self.context.layers[0], self.context.layers[-1]}:
            self.launch(stream_TD, None, layer)
            self.launch(stream_TD, stream_TD.clone(), layer)


class IdleHooks:
    """What hooks find that are called without a plan: they are to be called in every graph."""

    def __init__(self, hooks: CudaHooks) -> None:
        self.wanted_L = np.ones(hooks.context.layer_count, bool)
        self._hooks = hooks

    def visit(self, hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, layer: int) -> None:
        """Launches the kernel where a graph is recorded; elsewhere it would find the tables empty."""
        if self._hooks.copies.is_recording:
            self._hooks.launch(hidden_TD, residual_TD, layer)


class CudaForward:
    """One forward pass through filled tables."""

    def __init__(self, hooks: CudaHooks, plan: StepPlan, staged: StagedRows, halves: Sequence[int]) -> None:
        """`halves`: of the staging buffer, in which its rows are staged."""
        self.plan = plan
        self.wanted_L = plan.wanted_L
        self._hooks = hooks
        self._staged = staged
        self._halves = halves
        self._status = hooks.copies.pinned_buffer(len(hooks.tables.status))
        self._rows = hooks.copies.pinned_buffer(staged.size)
        self._rows_needed = int(plan.rows_N.max(initial=-1)) + 1
        self._collecting = threading.Lock()
        self._is_collected = False

    def visit(self, hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, layer: int) -> None:
        """Launches the kernel; called where no graph is replayed."""
        for tensor_TD in (hidden_TD,) if residual_TD is None else (hidden_TD, residual_TD):
            check_stream(
                tensor_TD, self._hooks.dtype, tuple(hidden_TD.shape), self._rows_needed, self._hooks.context.hidden_size
            )
        self._hooks.launch(hidden_TD, residual_TD, layer)

    def end(self) -> None:
        """Has the status and the staged rows copied, then the tables emptied."""
        self._arrival = self._send()
        self._hooks.clear_tables()

    def _send(self) -> CopyEvent:
        return self._hooks.send([self._copy_of_status()], [self._copy_of(self._staged)], self._halves)

    def _copy_of_status(self) -> Copy:
        return self._hooks.tables.status, self._status

    def _copy_of(self, staged: StagedRows) -> Copy:
        return staged.copy_of(self._hooks.tables.staging, self._rows)

    def discard(self) -> None:
        """Has the tables emptied."""
        self._is_collected = True
        self._hooks.clear_tables()

    def collect(self) -> None:
        """Waits for the copies and reads them."""
        with self._collecting:
            if self._is_collected:
                return
            self._arrival.synchronize()
            self._hooks.tables.read_status(self.plan, self._status)
            self._check_copied()
            self._staged.deliver(self._rows)
            self._is_collected = True

    def _check_copied(self) -> None:
        """All was copied at once."""


class LayerwiseCudaForward(CudaForward):
    """A forward pass that stages more than the buffer holds: every layer is copied before another comes over it."""

    def __init__(
        self, hooks: CudaHooks, plan: StepPlan, staged: StagedRows, schedule: Sequence[tuple[int, ...]]
    ) -> None:
        """`schedule`: halves of the staging buffer that its captured layers have, one after the other and again."""
        super().__init__(hooks, plan, staged, ())
        layers = np.unique(staged.layers_P).tolist()
        self._halves_of = {layer: schedule[number % len(schedule)] for number, layer in enumerate(layers)}
        self._copied: set[int] = set()

    def visit(self, hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, layer: int) -> None:
        """Launches the kernel, and the copy of what it stages."""
        halves = self._halves_of.get(layer, ())
        self._hooks.acquire_buffer(halves)
        super().visit(hidden_TD, residual_TD, layer)
        if halves:
            self._hooks.send([], [self._copy_of(self._staged.of_layer(layer))], halves)
            self._copied.add(layer)

    def _send(self) -> CopyEvent:
        return self._hooks.send([self._copy_of_status()], [])  # arrives after the copies of the layers

    def _check_copied(self) -> None:
        lost = sorted(set(self._halves_of) - self._copied)
        if lost:
            raise EngineFailed(
                f"a step captured more than the staging buffer holds, and the rows of layers {lost} were not "
                "copied in time: a graph was replayed that is larger than any that was announced",
                reason="STAGING_FULL",
            )


def staging_bytes(context: HookContext) -> int:
    """Room for all layers and both sites of the largest graph's rows in float32, and for one layer of any step's."""
    recorded = max(context.recorded_rows, min(context.requests, context.rows))  # a decoding step is staged whole
    return SITES * max(len(context.layers) * _layer_bytes(context, recorded), _layer_bytes(context, context.rows))


def _layer_bytes(context: HookContext, rows: int) -> int:
    return rows * context.hidden_size * 4 + context.requests * LINE
