"""The hook: one call after each decoder layer, which steers and captures the rows of the current plan.

In a graph of torch.compile the hook is a custom op, which torch does not look into. The op changes its arguments in
place, so a layer returns the same tensors with or without it. `layer_outputs` knows what the layers of each family
return.

Where vLLM has `LayerName`, the op has the layer's number in one. torch.compile makes it an input of the graph, so that
the pieces of a model's layers are one and the same: vLLM compiles and saves them once. A number in the graph would make
each a piece of its own.

Relies on (vLLM 0.24 to 0.33): `LayerName`, and `LayerNameType`, which is that class where torch (from 2.11 on) has such
inputs and VLLM_USE_LAYERNAME does not forbid them. tests/engine/test_compiled_pieces.py notices a change.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from vllm.utils.torch_utils import LayerName, LayerNameType

from steer_service.core.capture import CaptureSite
from steer_service.engine.worker.bank import ProgramBank
from steer_service.engine.worker.layer_outputs import LayerOutput, decoder_layers, layer_output_of
from steer_service.ops.cuda_tables import LINE
from steer_service.ops.plan import StepPlan

# A custom op finds the engine's state through the thread that runs the forward pass. A reference in the graph would be
# saved in vLLM's compile cache.
_current = threading.local()

HAS_NAMES = LayerNameType is LayerName
"""True if the op takes a LayerName; else it takes the layer's number."""

_library = torch.library.Library("steerllm", "DEF")
_library.define(
    "hook(Tensor(a!) hidden, Tensor(b!)? residual, "
    f"{'vllm.utils.torch_utils.LayerName' if HAS_NAMES else 'int'} layer) -> ()"
)


def _hook(hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, layer: LayerName | int) -> None:
    step = getattr(_current, "step", None)
    if step is not None:  # None while vLLM profiles and warms up
        step.visit(hidden_TD, residual_TD, layer if isinstance(layer, int) else int(layer.value))


def _hook_meta(hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, layer: LayerName | int) -> None:
    """Shapes and dtypes do not change."""


def visit_in_graph(hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, layer: int) -> None:
    """Calls the op: the hook of one layer as a graph has it."""
    torch.ops.steerllm.hook(hidden_TD, residual_TD, LayerName(str(layer)) if HAS_NAMES else layer)


_library.impl("hook", _hook, "CPU")
_library.impl("hook", _hook, "CUDA")
_library.impl("hook", _hook_meta, "Meta")


def use_step(step: Any) -> None:
    """Sets the forward pass whose `visit` this thread's hooks call; None for no forward pass."""
    _current.step = step


def install_hooks(model: torch.nn.Module, *, unverified: str = "") -> tuple[int, ...]:
    """Puts a hook after every decoder layer of this rank and returns the numbers of these layers.

    `unverified`: what layers of a class that is not in LAYER_OUTPUTS return, see LayerOutput; "" refuses them. Raises
    Unsupported for a refused class, and for a model whose layers are not found.
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
        if torch.compiler.is_compiling():  # a graph serves all steps, so the op decides when it runs
            visit = visit_in_graph
        else:
            step = getattr(_current, "step", None)
            if step is None or not step.wanted_L[layer]:
                return output
            visit = step.visit
        residual_stream = layer_output.stream_in(output)
        if (
            residual_stream is None
        ):  # not visited: the self-test refuses the model, and a step that wants the layer fails
            return output
        hidden_TD = residual_stream[0].contiguous()
        residual_TD = None if residual_stream[1] is None else residual_stream[1].contiguous()
        visit(_rows(hidden_TD), None if residual_TD is None else _rows(residual_TD), layer)
        return layer_output.with_stream(output, hidden_TD, residual_TD)

    module.forward = hooked  # type: ignore[method-assign]  # on the instance, before torch.compile traces it


def _rows(hidden: torch.Tensor) -> torch.Tensor:
    """A view of `hidden` as [rows, hidden_size]. Layers of transformers have a batch dimension of one."""
    return hidden if hidden.dim() == 2 else hidden.flatten(0, -2)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HookContext:
    """The model with hooks, on one worker."""

    bank: ProgramBank
    """The worker's programs, in host memory."""
    layers: Sequence[int]
    """Layers of this rank, in order; each has a hook."""
    layer_count: int
    """Layers of the whole model."""
    hidden_size: int
    """Hidden size of the residual stream."""
    dtype: str
    """Dtype of the residual stream."""
    device: torch.device
    """The model's device."""
    rows: int
    """Largest number of rows of a step, with padding."""
    requests: int
    """Largest number of requests of a step."""
    recorded_rows: int
    """Rows of the largest recorded graph; 0 if none is recorded."""
    stage_layers: int
    """Most layers of any rank, those of its pipeline stage."""
    staging_bytes: int = 0
    """Memory of a GPU in which captured rows wait for their copy to the host; 0 for the default."""
    writes_rows: bool = True
    """False if another tensor-parallel rank writes the same captured rows: only the self-test captures on this one."""

    @property
    def most_row_bytes(self) -> int:
        """Most bytes that are captured of one row: at all layers of a rank and both sites, in float32."""
        return len(CaptureSite) * self.stage_layers * (4 * self.hidden_size + LINE)


class HookedForward(Protocol):
    """One forward pass with a plan."""

    plan: StepPlan
    """The plan of the step."""
    wanted_L: npt.NDArray[np.bool_]
    """Layers whose hooks must be called; hooks in a graph are always called."""

    def visit(self, hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, layer: int) -> None:
        """Steers, captures and checks the plan's rows of one layer, in place."""

    def end(self) -> None:
        """Ends the forward pass: hooks that are called later do nothing."""

    def discard(self) -> None:
        """Instead of `end`, if the forward pass raised: nothing is collected."""

    def collect(self) -> None:
        """Returns when the plan's `visited` and `bad_N` are set and its captured rows are in their regions.

        Call it after `end`, in any thread. Further calls return at once.
        """


class Hooks(Protocol):
    """The hooks of one worker."""

    completes_later: bool
    """True if the device may still be running a forward pass that has returned, so that `collect` may wait."""

    staging_bytes: int
    """Memory of the device in which captured rows wait for their copy to the host; 0 where the device is the host."""
    pinned_bytes: int
    """Pinned memory of the host to which they are copied."""
    graph_bytes: int | None
    """Most bytes of captured rows of a step that replays graphs, the same on all ranks; None for any number."""

    def sync_slot(self, slot: int) -> None:
        """Updates the hooks, between two steps, after the bank's `slot` has changed."""

    def begin(self, plan: StepPlan, *, by_layer: bool = False) -> HookedForward:
        """Applies the plan to this thread's next forward pass.

        `by_layer`: captured rows are staged layer by layer, as where one step captures more than fits; its hooks must
        be called, and no graph replayed.
        """
