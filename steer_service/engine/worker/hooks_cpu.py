"""The hooks on a CPU: each layer's rows go through the Numba kernel as soon as the layer has returned."""

import numpy as np
import torch

from steer_service.engine.worker.hook_interface import HookContext
from steer_service.engine.worker.hooks import CpuForward, stream_dtype
from steer_service.ops.plan import NO_SLOT, PlannedRequest, RequestRows, StepPlan, build_plan


class CpuHooks:
    """Hooks that read the bank where it lies, and have done their work when the forward pass returns."""

    completes_later = False

    def __init__(self, site: HookContext) -> None:
        self._bank = site.bank
        self._dtype = stream_dtype(site.dtype)
        self._compile(site)

    def sync_slot(self, slot: int) -> None:
        """Nothing is copied."""

    def begin(self, plan: StepPlan) -> CpuForward:
        """Makes this thread's next forward pass do the plan."""
        step = CpuForward(plan, self._bank, self._dtype)
        step.__enter__()
        return step

    def _compile(self, site: HookContext) -> None:
        """Lets Numba compile (or load what it compiled before) now and not in the first request."""
        nothing = PlannedRequest(
            slot=NO_SLOT,
            steers_L=np.ones(site.layer_count, bool),
            before_L=np.zeros(site.layer_count, np.int64),
            after_L=np.zeros(site.layer_count, np.int64),
            row_limit=0,
        )
        stream_TD = torch.zeros(1, site.hidden_size, dtype=self._dtype)
        plan = build_plan([RequestRows("", 0, 1, 0)], [nothing], check_layer=site.layers[-1])
        CpuForward(plan, self._bank, self._dtype).visit(stream_TD, stream_TD.clone(), site.layers[0])
