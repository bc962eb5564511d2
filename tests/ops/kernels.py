"""The kernel under test: the CPU's, or the GPU's where Triton interprets (TRITON_INTERPRET=1) or STEERLLM_TEST_CUDA=1.

Triton decides when it is imported whether it compiles or interprets, so a process has one kernel; test_cuda.py starts
processes with the others. T: rows of the step; D: hidden size.
"""

import os

import torch

from steer_service.ops.cpu_step import StepKernel
from steer_service.ops.plan import HostBank, StepPlan

_CHOICES = {"interpreted": "TRITON_INTERPRET", "cuda": "STEERLLM_TEST_CUDA"}
KERNEL = next((kernel for kernel, name in _CHOICES.items() if os.environ.get(name) == "1"), "cpu")
"""interpreted, cuda or cpu."""

CASES = int(os.environ.get("STEERLLM_TEST_CASES", "2000"))
"""How many cases of the conformance suite are run: Triton's interpreter needs a quarter of a second for one."""


def run_layer(
    hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, plan: StepPlan, bank: HostBank, layer: int = 0
) -> None:
    """Steers, captures and checks the rows of one layer with the kernel under test, in place, as `plan` says."""
    if KERNEL == "cpu":
        StepKernel(plan, bank, hidden_TD.dtype).run(hidden_TD, residual_TD, layer)
    else:
        _run_triton(hidden_TD, residual_TD, plan, bank, layer, "cuda" if KERNEL == "cuda" else "cpu")


def _run_triton(
    hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, plan: StepPlan, bank: HostBank, layer: int, device: str
) -> None:
    from steer_service.ops.cuda_kernel import steer_and_capture
    from steer_service.ops.cuda_tables import BankTables, StepTables

    tables = BankTables.like(bank, device)
    rows, width = hidden_TD.shape
    step = StepTables(
        rows=rows + 1,
        requests=len(plan.requests) + 1,
        layers=len(plan.before_LR),
        width=width,
        dtype=hidden_TD.dtype,
        staging=2 * len(plan.before_LR) * (rows * width * 4 + 16 * len(plan.requests)),
        device=device,
    )
    staged = step.fill(plan)
    there = [None if tensor is None else tensor.to(device) for tensor in (hidden_TD, residual_TD)]
    steer_and_capture(there[0], there[1], layer, tables, step, checks=layer == plan.check_layer)
    step.collect(plan, staged)
    for here, tensor in zip((hidden_TD, residual_TD), there, strict=True):
        if here is not None:
            here.copy_(tensor)
