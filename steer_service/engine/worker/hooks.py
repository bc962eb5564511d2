"""The hook: one call after each decoder layer, which steers and captures the rows of the current plan.

Where torch.compile makes a graph it is a custom op, opaque to it. It mutates its arguments in place, so a layer's
output is the same tensors with or without it. `layer_outputs` knows what the layers of each family return.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from steer_service.core.errors import EngineFailed
from steer_service.engine.worker.bank import ProgramBank
from steer_service.engine.worker.layer_outputs import LayerOutput, decoder_layers, layer_output_of
from steer_service.ops.plan import StepPlan

# A custom op reaches the engine's state only through the thread that runs the forward pass: a reference in the graph
# would end up in vLLM's compile cache.
_current = threading.local()

_library = torch.library.Library("steerllm", "DEF")
_library.define("hook(Tensor(a!) hidden, Tensor(b!)? residual, int layer) -> ()")


def _hook(hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, layer: int) -> None:
    step = getattr(_current, "step", None)
    if step is not None:  # None while vLLM profiles and warms up
        step.visit(hidden_TD, residual_TD, layer)


def _hook_meta(hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, layer: int) -> None:
    """Shapes and dtypes do not change."""


_library.impl("hook", _hook, "CPU")
_library.impl("hook", _hook, "CUDA")
_library.impl("hook", _hook_meta, "Meta")


def use_step(step: Any) -> None:
    """Sets what this thread's hooks visit from now on, if they are wanted; None for nothing."""
    _current.step = step


def check_stream(
    tensor_TD: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], rows_needed: int, width: int
) -> None:
    """Raises EngineFailed for a tensor that a kernel, which writes at raw addresses, would misread."""
    if (
        tensor_TD.dtype != dtype
        or tensor_TD.shape != shape
        or shape[0] < rows_needed
        or shape[1] != width
        or not tensor_TD.is_contiguous()
    ):
        raise EngineFailed(
            f"a layer returned {tensor_TD.dtype} of {list(tensor_TD.shape)}, expected {dtype} of at least "
            f"[{rows_needed}, {width}], contiguous",
            reason="WRONG_STREAM",
        )


def install_hooks(model: torch.nn.Module, *, unverified: str = "") -> tuple[int, ...]:
    """Puts a hook behind every decoder layer that this rank holds and returns their layer numbers.

    `unverified`: what layers of a class that is not in LAYER_OUTPUTS return, see LayerOutput. Raises Unsupported for a
    model whose layers are not found, or whose class is not in LAYER_OUTPUTS if `unverified` is "".
    """
    attached = []
    for layer, module in enumerate(decoder_layers(model)):
        if type(module).__name__ == "PPMissingLayer":  # held by another pipeline stage
            continue
        _hook_module(module, layer, layer_output_of(module, unverified))
        attached.append(layer)
    return tuple(attached)


def _hook_module(module: torch.nn.Module, layer: int, layer_output: LayerOutput) -> None:
    forward = module.forward

    def hooked(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if torch.compiler.is_compiling():  # a graph is for all steps: the op looks when it is run
            visit = torch.ops.steerllm.hook
        else:
            step = getattr(_current, "step", None)
            if step is None or not step.wanted_L[layer]:
                return output
            visit = step.visit
        stream = layer_output.stream_in(output)
        if stream is None:  # not visited: the self-test refuses the model, and a step that wants the layer stops
            return output
        hidden_TD = stream[0].contiguous()
        residual_TD = None if stream[1] is None else stream[1].contiguous()
        visit(_rows(hidden_TD), None if residual_TD is None else _rows(residual_TD), layer)
        return layer_output.with_stream(output, hidden_TD, residual_TD)

    module.forward = hooked  # type: ignore[method-assign]  # on the instance, before torch.compile traces it


def _rows(stream: torch.Tensor) -> torch.Tensor:
    """The contiguous `stream` as [rows, width], in place: layers of transformers carry a batch dimension of one."""
    return stream if stream.dim() == 2 else stream.flatten(0, -2)


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
