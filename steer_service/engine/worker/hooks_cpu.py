"""The hooks on a CPU: the Numba kernel runs on each layer's rows as soon as the layer has returned."""

import numpy as np
import torch

from steer_service.core.errors import Unsupported
from steer_service.engine.worker.bank import ProgramBank
from steer_service.engine.worker.hooks import HookContext, use_step
from steer_service.ops.cpu_kernel import DTYPES
from steer_service.ops.cpu_step import StepKernel
from steer_service.ops.plan import NO_SLOT, PlannedRequest, RequestRows, StepPlan, build_plan
from steer_service.ops.stream_check import check_stream


class CpuForward:
    """Runs a plan's rows through the kernel, layer by layer, during one forward pass."""

    def __init__(self, plan: StepPlan, bank: ProgramBank, dtype: torch.dtype) -> None:
        self.plan = plan
        """The plan of the step."""
        self.wanted_L = plan.wanted_L
        """Layers whose hooks must be called."""
        self._kernel = StepKernel(plan, bank, dtype)
        self._dtype = dtype
        self._hidden_size = bank.directions_WD.shape[1]
        self._rows_needed = int(plan.rows_N.max(initial=-1)) + 1

    def visit(self, hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, layer: int) -> None:
        """Steers, captures and checks the plan's rows of one layer, in place."""
        if not self.wanted_L[layer]:
            return
        for tensor_TD in (hidden_TD,) if residual_TD is None else (hidden_TD, residual_TD):
            check_stream(tensor_TD, self._dtype, hidden_TD.shape, self._rows_needed, self._hidden_size)
        self._kernel.run(hidden_TD, residual_TD, layer)
        self.plan.visited.add(layer)

    def end(self) -> None:
        """Ends the forward pass: hooks that are called later do nothing."""
        use_step(None)

    discard = end

    def collect(self) -> None:
        """Returns at once: everything was done while the layers ran."""

    def __enter__(self) -> None:
        use_step(self)

    def __exit__(self, *_: object) -> None:
        self.end()


def stream_dtype(name: str) -> torch.dtype:
    """The torch dtype of this name; raises Unsupported if the CPU kernel does not support it."""
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    if name not in dtypes:
        raise Unsupported(
            f"the CPU kernel does not support a {name} residual stream; load the model as {', '.join(dtypes)}",
            reason="DTYPE_NOT_BUILT",
        )
    return dtypes[name]


class CpuHooks:
    """Hooks that read the bank in place and have finished when the forward pass returns."""

    completes_later = False
    staging_bytes = pinned_bytes = 0
    graph_bytes: int | None = None

    def __init__(self, context: HookContext) -> None:
        self._bank = context.bank
        self._dtype = stream_dtype(context.dtype)
        self._compile(context)

    def sync_slot(self, slot: int) -> None:
        """Does nothing, because the bank is not copied."""

    def begin(self, plan: StepPlan, *, by_layer: bool = False) -> CpuForward:
        """Applies the plan to this thread's next forward pass; nothing is staged."""
        step = CpuForward(plan, self._bank, self._dtype)
        step.__enter__()
        return step

    def _compile(self, context: HookContext) -> None:
        """Makes Numba compile the kernel, or load it from its cache, before the first request."""
        idle_request = PlannedRequest(
            slot=NO_SLOT,
            steers_L=np.ones(context.layer_count, bool),
            before_L=np.zeros(context.layer_count, np.int64),
            after_L=np.zeros(context.layer_count, np.int64),
            row_limit=0,
        )
        hidden_TD = torch.zeros(1, context.hidden_size, dtype=self._dtype)
        plan = build_plan([RequestRows("", 0, 1, 0)], [idle_request], check_layer=context.layers[-1])
        CpuForward(plan, self._bank, self._dtype).visit(hidden_TD, hidden_TD.clone(), context.layers[0])
