"""The proof of the kernel: lets the kernel through, and none of several faulty ones. Run by test_cuda.py too."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from steer_service.engine.slots import BankSize
from steer_service.engine.worker import hooks_cpu
from steer_service.engine.worker.bank import ProgramBank
from steer_service.engine.worker.hooks import HookContext, Hooks
from steer_service.engine.worker.hooks_cpu import CpuHooks
from steer_service.engine.worker.hooks_cuda import CudaHooks
from steer_service.engine.worker.kernel_proof import KernelFault, prove_kernel
from steer_service.ops.cpu_step import StepKernel
from tests.ops.kernels import KERNEL

LAYERS = (1, 2, 3)
"""Of a rank that has not the first of four layers."""


def context_with(
    *,
    dtype: str = "float32",
    width: int = 24,
    rows: int = 64,
    slots: int = 16,
    operations: int = 4,
    bank_rows: int = 64,
) -> HookContext:
    size = BankSize(slots=slots, rows=bank_rows, operations_per_layer=operations)
    return HookContext(
        bank=ProgramBank(size, LAYERS, 4, width),
        layers=LAYERS,
        layer_count=4,
        stage_layers=4,
        hidden_size=width,
        dtype=dtype,
        device=torch.device("cpu"),
        rows=rows,
        requests=rows,
        recorded_rows=0,
    )


def hooks_for(context: HookContext) -> Hooks:
    return CpuHooks(context) if KERNEL == "cpu" else CudaHooks(context)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("width", [1, 24, 576])
def test_the_kernel_of_this_device_passes_and_leaves_an_empty_bank(dtype: str, width: int) -> None:
    context = context_with(dtype=dtype, width=width)
    hooks = hooks_for(context)

    proof = prove_kernel(context, hooks)

    assert proof.rows == 2 * 2 * 48
    assert proof.worst < 1.0
    assert dtype != "float32" or proof.worst > 0.0  # 16 bits round away what the kernel is off
    assert not context.bank.op_counts_LS.any()
    assert not context.bank.directions_WD.any()


@pytest.mark.parametrize(
    "small",
    [{"rows": 1}, {"rows": 5}, {"slots": 1}, {"operations": 1}, {"bank_rows": 1}, {"bank_rows": 5, "operations": 2}],
)
def test_a_small_engine_is_proven_in_several_passes(small: dict[str, int]) -> None:
    context = context_with(**small)  # type: ignore[arg-type]

    assert prove_kernel(context, hooks_for(context)).worst < 1.0


Fault = Callable[[StepKernel, torch.Tensor, torch.Tensor | None, int], None]


def _swapped(kernel: StepKernel, hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, layer: int) -> None:
    """Steers the row below each one."""
    for tensor_TD in (hidden_TD,) if residual_TD is None else (hidden_TD, residual_TD):
        tensor_TD.copy_(tensor_TD.roll(1, 0))


def _scaled(kernel: StepKernel, hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, layer: int) -> None:
    """Makes the rows of requests by a little too long."""
    tensor_TD = hidden_TD if residual_TD is None else residual_TD
    tensor_TD[:-1].mul_(1.0 + 1e-5)


def _half_written(kernel: StepKernel, hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, layer: int) -> None:
    """Leaves in `hidden` what is in `residual` too."""
    if residual_TD is not None:
        hidden_TD[0, 0] = 1.0


def _padding(kernel: StepKernel, hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, layer: int) -> None:
    """Writes to the row behind those of requests."""
    hidden_TD[-1, -1] += 1.0


@pytest.mark.skipif(KERNEL != "cpu", reason="the faults are put behind the CPU's kernel")
@pytest.mark.parametrize(
    ("fault", "finding"),
    [
        (_swapped, "outside the tolerance|was changed"),
        (_scaled, "Add: .*outside the tolerance"),
        (_half_written, "in one tensor alone"),
        (_padding, "a row of no request was changed"),
    ],
)
def test_a_faulty_kernel_is_found(fault: Fault, finding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Faulty(StepKernel):
        def run(self, hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, layer: int) -> None:
            super().run(hidden_TD, residual_TD, layer)
            fault(self, hidden_TD, residual_TD, layer)

    context = context_with()
    hooks = hooks_for(context)
    monkeypatch.setattr(hooks_cpu, "StepKernel", Faulty)

    with pytest.raises(KernelFault, match=rf"the kernel on cpu, after layer 1, with .*{finding}"):
        prove_kernel(context, hooks)


def _swapped_captures(plan: Any) -> None:
    plan.before_LR, plan.after_LR = plan.after_LR, plan.before_LR


def _wrong_scope(plan: Any) -> None:
    if plan.scopes_N is not None:
        plan.scopes_N[:] = np.uint64(2**64 - 1)


def _hidden_bad_rows(plan: Any) -> None:
    plan.bad_N = np.zeros_like(plan.bad_N)


def _not_visited(plan: Any) -> None:
    plan.visited.clear()


@pytest.mark.parametrize(
    ("before", "after", "finding"),
    [
        (_swapped_captures, None, "Add: rows captured before steering, in torch.float32, differ from the stream"),
        (_wrong_scope, None, "Add then Ablation: .*outside the tolerance"),
        (None, _hidden_bad_rows, "Add: .*called good, and bad"),
        (None, _not_visited, "the kernel did not run"),
    ],
)
def test_a_wrong_plan_and_a_wrong_report_are_found(before: Any, after: Any, finding: str) -> None:
    context = context_with()
    hooks = hooks_for(context)
    begin = hooks.begin

    def begun(plan: Any) -> Any:
        if before is not None:
            before(plan)
        forward = begin(plan)
        collect = forward.collect

        def collected() -> None:
            collect()
            if after is not None:
                after(plan)

        forward.collect = collected  # type: ignore[method-assign]
        return forward

    hooks.begin = begun  # type: ignore[method-assign]
    with pytest.raises(KernelFault, match=finding):
        prove_kernel(context, hooks)
