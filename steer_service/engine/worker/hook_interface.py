"""What the engine asks of a device: hooks that do a plan during a forward pass, and tell when it has been done.

`CpuHooks` (device_cpu.py) do it while the layers run; `CudaHooks` (device_cuda.py) leave it to the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from steer_service.engine.worker.bank import ProgramBank
from steer_service.ops.plan import StepPlan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HookContext:
    """The model that is hooked, as one worker holds it."""

    bank: ProgramBank
    """The programs of the worker, in the host's memory."""
    layers: Sequence[int]
    """Layers with a hook on this rank, in order."""
    layer_count: int
    """Layers of the whole model."""
    hidden_size: int
    """Width of the stream."""
    dtype: str
    """Element type of the stream."""
    device: torch.device
    """Where the model runs."""
    rows: int
    """Rows of a step at most, padding included."""
    requests: int
    """Requests of a step at most."""
    recorded_rows: int
    """Rows of the largest recorded graph; 0 if none is recorded."""


class HookedForward(Protocol):
    """One forward pass that does a plan."""

    plan: StepPlan
    """What is done."""
    wanted_L: npt.NDArray[np.bool_]
    """Layers whose hooks are to be called, of those that a graph does not call by itself."""

    def visit(self, hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, layer: int) -> None:
        """Steers, captures and checks the plan's rows of one layer, in place."""

    def end(self) -> None:
        """Follows the forward pass: hooks that are called from now on do nothing."""

    def discard(self) -> None:
        """Instead of `end`, for a forward pass that raised: nothing of it is collected."""

    def collect(self) -> None:
        """Returns when `visited` and `bad_N` of the plan are filled and its captured rows lie where they belong.

        Follows `end`, in any thread; asked again, it returns at once.
        """


class Hooks(Protocol):
    """The hooks of one worker."""

    completes_later: bool
    """Whether a pass may still be under way when its forward pass has returned, so that collecting it takes time."""

    def sync_slot(self, slot: int) -> None:
        """Comes between two steps, when the bank's `slot` holds something else than before."""

    def begin(self, plan: StepPlan) -> HookedForward:
        """Makes this thread's next forward pass do the plan."""
