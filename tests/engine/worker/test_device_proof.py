"""The proof of a device without a model: lets this one through, and none with a fault. Run by test_cuda.py too."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from steer_service.engine.worker import device_proof, hooks_cpu
from steer_service.engine.worker.bank import ProgramBank
from steer_service.engine.worker.device_proof import DTYPES, WIDTHS, prove_device
from steer_service.engine.worker.hooks import HookContext, Hooks, use_step
from steer_service.engine.worker.hooks_cpu import CpuHooks
from steer_service.engine.worker.hooks_cuda import CudaHooks
from steer_service.engine.worker.kernel_proof import KernelFault, KernelProof
from steer_service.ops.cuda_tables import BankTables, StepTables
from tests.ops.kernels import KERNEL

CPU = torch.device("cpu")
IS_CPU = KERNEL == "cpu"


def make_hooks(context: HookContext) -> Hooks:
    return CpuHooks(context) if IS_CPU else CudaHooks(context)


def test_this_device_passes_for_each_dtype_and_width(monkeypatch: pytest.MonkeyPatch) -> None:
    if not IS_CPU:  # Triton's interpreter needs seconds for each
        monkeypatch.setattr(device_proof, "WIDTHS", WIDTHS[:1])
    widths = device_proof.WIDTHS

    proofs = list(prove_device(CPU, make_hooks))

    assert [(proof.dtype, proof.width) for proof in proofs] == [(dtype, width) for dtype in DTYPES for width in widths]
    assert all(proof.kernel_rows == 192 and proof.kernel_error < 1.0 for proof in proofs)
    assert all(proof.ways == ("called",) for proof in proofs)


def _not_cleared(patch: pytest.MonkeyPatch) -> None:
    if IS_CPU:
        patch.setattr(hooks_cpu, "use_step", lambda step: step is None or use_step(step))
    else:  # a graph would replay the launches that find the tables as they were
        patch.setattr(StepTables, "clear", lambda _: None)
        patch.setattr(device_proof, "visit_in_graph", launched)


def launched(hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, layer: int) -> None:
    """Launches the kernel whether or not a pass has a plan."""
    current[0].launch(hidden_TD, residual_TD, layer)


current: list[CudaHooks] = []


def _stale_slot(patch: pytest.MonkeyPatch) -> None:
    owner: Any = ProgramBank if IS_CPU else BankTables
    name = "load" if IS_CPU else "update"
    method: Callable[..., None] = getattr(owner, name)
    seen: list[int] = []

    def once(tables: Any, *args: Any) -> None:
        seen.append(1)
        if len(seen) != 2:  # the program of the second pass
            method(tables, *args)

    patch.setattr(owner, name, once)


@pytest.mark.parametrize(
    ("fault", "finding"),
    [
        (_not_cleared, "a pass without a plan, after others"),
        (_stale_slot, "the plan of pass 1 has not steered the row"),
    ],
)
def test_a_fault_of_the_passes_is_found(fault: Any, finding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(context: HookContext) -> Hooks:
        hooks = make_hooks(context)
        current[:] = [hooks]  # type: ignore[list-item]
        return hooks

    monkeypatch.setattr(device_proof, "prove_kernel", lambda *_: KernelProof(rows=0, worst=0.0))
    fault(monkeypatch)

    with pytest.raises(KernelFault, match=f"passes on cpu, called, of bfloat16 and width 576: {finding}"):
        list(prove_device(CPU, made))
    use_step(None)
