"""The hook: one call after each decoder layer, which steers and captures the rows of the current plan.

Where torch.compile makes a graph it is a custom op, opaque to it. It mutates its arguments in place, so a layer's
output is the same tensors with or without it. `layer_outputs` knows what the layers of each family return.
"""

import threading
from typing import Any

import torch

from steer_service.core.errors import EngineFailed, Unsupported
from steer_service.engine.worker.bank import ProgramBank
from steer_service.engine.worker.layer_outputs import Convention, convention_of, decoder_layers
from steer_service.ops.cpu_kernel import DTYPES, StepKernel
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


class CpuForward:
    """Runs a plan's rows through the kernel, layer by layer, during one forward pass."""

    def __init__(self, plan: StepPlan, bank: ProgramBank, dtype: torch.dtype) -> None:
        self.plan = plan
        """What is done."""
        self.wanted_L = plan.wanted_L
        """Layers whose hooks are to be called."""
        self._kernel = StepKernel(plan, bank, dtype)
        self._dtype = dtype
        self._width = bank.directions_WD.shape[1]
        self._rows_needed = int(plan.rows_N.max(initial=-1)) + 1

    def visit(self, hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, layer: int) -> None:
        """Steers, captures and checks the plan's rows of one layer, in place."""
        if not self.wanted_L[layer]:
            return
        for tensor_TD in (hidden_TD,) if residual_TD is None else (hidden_TD, residual_TD):
            check_stream(tensor_TD, self._dtype, hidden_TD.shape, self._rows_needed, self._width)
        self._kernel.run(hidden_TD, residual_TD, layer)
        self.plan.visited.add(layer)

    def end(self) -> None:
        """Hooks do nothing from now on."""
        use_step(None)

    discard = end

    def collect(self) -> None:
        """All was done while the layers ran."""

    def __enter__(self) -> None:
        use_step(self)

    def __exit__(self, *_: object) -> None:
        self.end()


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


def stream_dtype(name: str) -> torch.dtype:
    """The dtype of this name; raises Unsupported if the CPU kernel has none for it."""
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    if name not in dtypes:
        raise Unsupported(
            f"steering a {name} stream on the CPU is not built; load the model as {', '.join(dtypes)}",
            reason="DTYPE_NOT_BUILT",
        )
    return dtypes[name]


def install_hooks(model: torch.nn.Module, *, unverified: str = "") -> tuple[int, ...]:
    """Puts a hook behind every decoder layer that this rank holds and returns their layer numbers.

    `unverified`: what layers of a class that is not in CONVENTIONS return, see Convention. Raises Unsupported for a
    model whose layers are not found, or whose class is not in CONVENTIONS if `unverified` is "".
    """
    attached = []
    for layer, module in enumerate(decoder_layers(model)):
        if type(module).__name__ == "PPMissingLayer":  # held by another pipeline stage
            continue
        _hook_module(module, layer, convention_of(module, unverified))
        attached.append(layer)
    return tuple(attached)


def _hook_module(module: torch.nn.Module, layer: int, convention: Convention) -> None:
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
        stream = convention.stream_in(output)
        if stream is None:  # not visited: the self-test refuses the model, and a step that wants the layer stops
            return output
        hidden_TD = stream[0].contiguous()
        residual_TD = None if stream[1] is None else stream[1].contiguous()
        visit(_rows(hidden_TD), None if residual_TD is None else _rows(residual_TD), layer)
        return convention.with_stream(output, hidden_TD, residual_TD)

    module.forward = hooked  # type: ignore[method-assign]  # on the instance, before torch.compile traces it


def _rows(stream: torch.Tensor) -> torch.Tensor:
    """The contiguous `stream` as [rows, width], in place: layers of transformers carry a batch dimension of one."""
    return stream if stream.dim() == 2 else stream.flatten(0, -2)
