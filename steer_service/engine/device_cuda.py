"""The taps on a GPU: tables that stay where they are, one kernel a layer, and captures copied beside the model.

Every launch has the same arguments, so that a CUDA graph may hold them; what they do depends on the tables, which are
filled before a forward pass and emptied behind it: profiling, recording and idle steps find them empty. All that
touches the tables goes to the stream of the model, in the order in which it is said.

Captured rows are staged on the device and copied to the host while the model goes on. Two passes may be under way: each
has a half of the staging buffer and of its copy in the host's memory, and the second next waits until the first was
collected. What does not fit a half waits for all. Every pass that a graph replays fits into the whole; what does not is
a pass whose taps are called one by one, and its rows are copied layer by layer, which costs time.
"""

import threading
from collections import deque

import numpy as np
import torch

from steer_service.core.errors import EngineFailed
from steer_service.engine.device import TapSite
from steer_service.engine.tap import check_stream, use_step
from steer_service.ops.cuda import LINE, BankTables, StagedRows, StepTables, tap
from steer_service.ops.lane import lane_of
from steer_service.ops.plan import StepPlan

SITES = 2
"""Before steering, and after."""


class CudaTaps:
    """Taps whose tables are on the device; in tests the device is a CPU, where Triton interprets the kernel."""

    is_late = True

    def __init__(self, site: TapSite, *, staging: int | None = None) -> None:
        """`staging` is for tests; the bytes are otherwise those of `staging_bytes`."""
        self.dtype = getattr(torch, site.dtype)
        self.site = site
        self.lane = lane_of(site.device)
        self.tables = StepTables(
            rows=max(site.rows, site.recorded_rows),
            requests=site.requests,
            layers=site.layer_count,
            width=site.hidden_size,
            dtype=self.dtype,
            staging=staging_bytes(site) if staging is None else staging,
            device=site.device,
        )
        self.staged = self.lane.memory(len(self.tables.staging))
        self._bank_tables = BankTables.like(site.bank, site.device)
        self._notes = [self.lane.memory(len(self.tables.notes)) for _ in range(2)]
        self._half = len(self.tables.staging) // 2 // LINE * LINE
        self._under_way: deque[CudaPass] = deque()
        self._resting = _Resting(self)
        self._compile()
        self.rest()

    def follow(self, slot: int) -> None:
        """Copies what the slot holds to the device, behind the steps that still need what it held."""
        self._bank_tables.update(self.site.bank, slot)

    def begin(self, plan: StepPlan) -> "CudaPass":
        """Fills the tables, once nothing is under way any more that would be written over."""
        needed = self.tables.bytes_of(plan)
        fits, by_layer = needed <= self._half, needed > len(self.tables.staging)
        self._make_way(1 if fits else 0)
        half = 1 - self._under_way[-1].half if self._under_way else 0
        staged = self.tables.fill(plan, start=half * self._half if fits else 0, by_layer=by_layer)
        begun = CudaPass(self, plan, staged, self._notes[half], half=half, fits=fits, by_layer=by_layer)
        self._under_way.append(begun)
        use_step(begun)
        return begun

    def _make_way(self, others: int) -> None:
        """Collects passes, the oldest first, until at most so many may be under way, and those in one half only."""
        while self._under_way and (len(self._under_way) > others or not self._under_way[-1].fits):
            self._under_way.popleft().collect()

    def launch(self, hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, layer: int) -> None:
        """The kernel, on the current stream."""
        checks = layer == self.site.layers[-1]
        tap(hidden_TD, residual_TD, layer, self._bank_tables, self.tables, checks=checks)

    def rest(self) -> None:
        """Empties the tables behind what was launched; taps called from now on do nothing unless they are recorded."""
        self.tables.clear()
        use_step(self._resting)

    def forget(self, void: "CudaPass") -> None:
        """Takes back a pass of which nothing will be collected."""
        self._under_way.remove(void)

    def _compile(self) -> None:
        """Lets Triton compile now: it must not while a graph is recorded."""
        stream_TD = torch.zeros(1, self.site.hidden_size, dtype=self.dtype, device=self.site.device)
        for layer in {self.site.layers[0], self.site.layers[-1]}:
            self.launch(stream_TD, None, layer)
            self.launch(stream_TD, stream_TD.clone(), layer)


class _Resting:
    """What taps find that are called without a plan: they are to be called in every graph."""

    def __init__(self, taps: CudaTaps) -> None:
        self.wanted_L = np.ones(taps.site.layer_count, bool)
        self._taps = taps

    def visit(self, hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, layer: int) -> None:
        """Launches the kernel where a graph is recorded; elsewhere it would find the tables empty."""
        if self._taps.lane.is_recording:
            self._taps.launch(hidden_TD, residual_TD, layer)


class CudaPass:
    """One forward pass through filled tables."""

    def __init__(
        self,
        taps: CudaTaps,
        plan: StepPlan,
        staged: StagedRows,
        notes: torch.Tensor,
        *,
        half: int,
        fits: bool,
        by_layer: bool,
    ) -> None:
        self.plan = plan
        self.wanted_L = plan.wanted_L
        self.half = half
        """Which memory for notes is its own; and which half of the staging buffer, if it fits one."""
        self.fits = fits
        """Whether it does, and leaves the other to another pass."""
        self._taps = taps
        self._staged = staged
        self._notes = notes
        self._by_layer = by_layer
        self._copied: set[int] = set()
        self._rows_needed = int(plan.rows_N.max(initial=-1)) + 1
        self._collecting = threading.Lock()
        self._is_collected = False

    def visit(self, hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, layer: int) -> None:
        """Launches the kernel; called where no graph is replayed."""
        for tensor_TD in (hidden_TD,) if residual_TD is None else (hidden_TD, residual_TD):
            check_stream(
                tensor_TD, self._taps.dtype, tuple(hidden_TD.shape), self._rows_needed, self._taps.site.hidden_size
            )
        self._taps.launch(hidden_TD, residual_TD, layer)
        if self._by_layer:
            self._copy_layer(layer)

    def end(self) -> None:
        """Has the notes and the staged rows copied, then the tables emptied."""
        taps, span = self._taps, self._staged.span
        rows = [] if self._by_layer else [(taps.tables.staging[span], taps.staged[span])]
        self._arrival = taps.lane.send([(taps.tables.notes, self._notes)], rows)
        taps.rest()

    def discard(self) -> None:
        """Has the tables emptied."""
        self._is_collected = True
        self._taps.forget(self)
        self._taps.rest()

    def collect(self) -> None:
        """Waits for the copies and reads them."""
        with self._collecting:
            if self._is_collected:
                return
            self._arrival.synchronize()
            self._taps.tables.read_notes(self.plan, self._notes)
            if self._by_layer:
                self._check_copied()
            else:
                self._staged.deliver(self._taps.staged)
            self._is_collected = True

    def _copy_layer(self, layer: int) -> None:
        """Waits for the layer and puts its rows where they belong, before the next layer is staged over them."""
        taps, part = self._taps, self._staged.of_layer(layer)
        taps.lane.send([], [(taps.tables.staging[part.span], taps.staged[part.span])]).synchronize()
        part.deliver(taps.staged)
        self._copied.add(layer)

    def _check_copied(self) -> None:
        lost = set(self._staged.layers_P.tolist()) - self._copied
        if lost:
            raise EngineFailed(
                f"a step captured more than the staging buffer holds, and the rows of layers {sorted(lost)} were not "
                "copied in time: a graph was replayed that is larger than any that was announced",
                reason="STAGING_FULL",
            )


def staging_bytes(site: TapSite) -> int:
    """Room for all layers and both sites of the largest graph's rows in float32, and for one layer of any step's."""
    recorded = max(site.recorded_rows, min(site.requests, site.rows))  # a decoding step is staged whole
    return SITES * max(len(site.layers) * _layer_bytes(site, recorded), _layer_bytes(site, site.rows))


def _layer_bytes(site: TapSite, rows: int) -> int:
    return rows * site.hidden_size * 4 + site.requests * LINE
