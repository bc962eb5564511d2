"""The proof of a device without a model: the kernel, and the order and emptying of passes.

The passes are those of a toy whose layers change nothing but for their hooks. On a GPU they are also replayed from a
CUDA graph, as an engine's steps are.

T: rows of the step; D: hidden size; L: layers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from steer_service.core.specs import SteeringSpec
from steer_service.engine.slots import BankSize
from steer_service.engine.worker.bank import ProgramBank
from steer_service.engine.worker.devices import hooks_for
from steer_service.engine.worker.hooks import HookContext, HookedForward, Hooks, visit_in_graph
from steer_service.engine.worker.kernel_proof import KernelFault, prove_kernel
from steer_service.engine.worker.proof_programs import ProofPrograms
from steer_service.ops.plan import NO_SLOT, PlannedRequest, RequestRows, build_plan

DTYPES = ("bfloat16", "float16", "float32")
"""Dtypes of residual streams that models have."""

WIDTHS = (576, 4096, 8192)
"""Hidden sizes: of the bundled model, of 8B models and of 70B models."""

LAYERS, ROWS = 4, 8

MakeHooks = Callable[[HookContext], Hooks]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProof:
    """What was proven for one dtype and hidden size."""

    dtype: str
    """Dtype of the residual stream."""
    width: int
    """Hidden size."""
    kernel_rows: int
    """Rows that were compared with float64."""
    kernel_error: float
    """Their largest error in units of the tolerance."""
    ways: tuple[str, ...]
    """How the passes were run whose order and emptying was proven."""


def prove_device(device: torch.device, make_hooks: MakeHooks = hooks_for) -> Iterator[DeviceProof]:
    """Proves each dtype and hidden size; raises KernelFault at the first fault."""
    for dtype in DTYPES:
        for width in WIDTHS:
            context = _context(device, dtype, width)
            hooks = make_hooks(context)
            kernel = prove_kernel(context, hooks)
            ways = []
            for way, run in _runs(context).items():
                try:
                    _prove_passes(context, hooks, *run)
                except KernelFault as fault:
                    where = f"passes on {device.type}, {way}, of {dtype} and width {width}"
                    raise KernelFault(f"{where}: {fault}") from fault
                ways.append(way)
            yield DeviceProof(
                dtype=dtype, width=width, kernel_rows=kernel.rows, kernel_error=kernel.worst, ways=tuple(ways)
            )


def _context(device: torch.device, dtype: str, width: int) -> HookContext:
    layers = range(LAYERS)
    return HookContext(
        bank=ProgramBank(BankSize(slots=16, rows=64, operations_per_layer=4), layers, LAYERS, width),
        layers=layers,
        layer_count=LAYERS,
        hidden_size=width,
        dtype=dtype,
        device=device,
        rows=64,
        requests=16,
        recorded_rows=ROWS,
        stage_layers=LAYERS,
    )


def _runs(context: HookContext) -> dict[str, tuple[torch.Tensor, Callable[[], object]]]:
    """Ways to run a pass: its stream, which is an input and an output, and what runs the layers."""
    stream_TD, run = _toy(context)
    runs: dict[str, tuple[torch.Tensor, Callable[[], object]]] = {"called": (stream_TD, run)}
    if context.device.type == "cuda":
        stream_TD, run = _toy(context)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        runs["replayed from a graph"] = stream_TD, graph.replay
    return runs


def _toy(context: HookContext) -> tuple[torch.Tensor, Callable[[], object]]:
    stream_TD = torch.zeros(ROWS, context.hidden_size, dtype=getattr(torch, context.dtype), device=context.device)

    def run() -> None:
        for layer in context.layers:
            visit_in_graph(stream_TD, None, layer)

    return stream_TD, run


def _prove_passes(context: HookContext, hooks: Hooks, stream_TD: torch.Tensor, run: Callable[[], object]) -> None:
    """Runs three plans, with other programs in between, and none; then collects them all."""
    values, outputs, begun = (1.0, 2.0, 4.0), [], []
    with ProofPrograms(context, hooks) as programs:
        for number, value in enumerate(values):
            programs.load(0, SteeringSpec.simple_add(number, np.full(context.hidden_size, value, np.float32)))
            captured_LD = torch.full((LAYERS, context.hidden_size), -1.0, dtype=stream_TD.dtype)
            stream_TD.zero_()
            forward = _begin(context, hooks, row=number, captured_LD=captured_LD)
            run()
            forward.end()
            outputs.append(stream_TD.clone())
            begun.append((forward, captured_LD))
        stream_TD.zero_()
        run()
        idle_TD = stream_TD.clone()
        for forward, _ in begun:
            forward.collect()
    if idle_TD.any():
        raise KernelFault("a pass without a plan, after others, changes the stream")
    for number, (value, output_TD, (forward, captured_LD)) in enumerate(zip(values, outputs, begun, strict=True)):
        want_TD = torch.zeros_like(output_TD)
        want_TD[number] = value
        if not torch.equal(output_TD, want_TD):
            raise KernelFault(f"the plan of pass {number} has not steered the row that it names, or others too")
        want_LD = torch.zeros_like(captured_LD)
        want_LD[number:] = value
        if forward.plan.unvisited(context.layers) or not torch.equal(captured_LD, want_LD):
            raise KernelFault(f"the rows captured in pass {number} are not those of its stream")


def _begin(context: HookContext, hooks: Hooks, *, row: int, captured_LD: torch.Tensor) -> HookedForward:
    """Begins a pass in which slot 0 steers one row, which is captured; the row below it is captured by nobody."""
    after_L = np.array([captured_LD[layer].data_ptr() for layer in context.layers], np.int64)
    request = PlannedRequest(
        slot=0,
        steers_L=context.bank.op_counts_LS[:, 0] > 0,
        before_L=np.zeros(LAYERS, np.int64),
        after_L=after_L,
        row_limit=1,
    )
    other = PlannedRequest(
        slot=NO_SLOT,
        steers_L=np.zeros(LAYERS, bool),
        before_L=np.zeros(LAYERS, np.int64),
        after_L=np.zeros(LAYERS, np.int64),
        row_limit=0,
    )
    rows = [RequestRows("steered", row, 1, 0), RequestRows("other", row + 1, 1, 0)]
    return hooks.begin(build_plan(rows, [request, other], check_layer=context.layers[-1]))
