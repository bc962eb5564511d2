"""Compares the GPU's steering kernel with a plain copy of as many bytes: `python -m bench.kernel_gpu`.

Needs a GPU, torch, Triton and numpy, nothing of vLLM. Each case is a layer of a bfloat16 model that returns hidden and
residual. It is recorded in a CUDA graph over enough tensors that none is still in the cache when it is used again. The
copy is timed in the same way. Before it is timed, each case is compared with the formula.

T: rows; D: hidden size.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from steer_service.ops.cuda_kernel import steer_and_capture
from steer_service.ops.cuda_tables import BankTables, StepTables
from steer_service.ops.plan import NO_SLOT, PlannedRequest, RequestRows, build_plan

ROWS = (32, 256, 2048, 8192)
HIDDEN_SIZES = (1024, 4096, 8192)
PROGRAMS = ("idle", "1 add", "1 cap", "3 caps", "capture", "1 cap + capture")
"""The work on every row. Each program of the bank serves 16 rows; 3 caps are three operations."""

ROWS_OF_A_REQUEST = 16
SPREAD = 512 << 20
"""Bytes that a graph reads: several times the largest cache."""
REPLAYS = 10
BOUND = 1.0
"""Upper bound of the caps; the lower bound is its negative."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One line of the table."""

    rows: int
    width: int
    program: str

    @property
    def caps(self) -> int:
        """Operations that need the projection."""
        return {"1 cap": 1, "3 caps": 3, "1 cap + capture": 1}.get(self.program, 0)

    @property
    def operations(self) -> int:
        """Operations at the layer."""
        return 1 if self.program == "1 add" else self.caps

    @property
    def is_captured(self) -> bool:
        """Whether each row is captured after steering."""
        return "capture" in self.program

    @property
    def bytes_moved(self) -> int:
        """Bytes read and written in the device's memory; directions count once per request."""
        steered = 4 * 2 * self.rows * self.width if self.operations else 0  # two tensors, read and written
        read = 2 * 2 * self.rows * self.width if self.is_captured and not self.operations else 0
        captured = 2 * self.rows * self.width if self.is_captured else 0
        return steered + read + captured + 4 * self.operations * self.width * self.requests

    @property
    def requests(self) -> int:
        """Requests in the step, each with a program of its own."""
        return -(-self.rows // ROWS_OF_A_REQUEST)


def bank_of(case: Case, device: str) -> BankTables:
    """A bank with a program for each request; its directions are unit vectors, in an Add a thousandth of one."""
    directions_WD = torch.randn(max(case.operations, 1) * case.requests, case.width, device=device)
    directions_WD /= directions_WD.norm(dim=1, keepdim=True)
    row_C = [1.0, 0.0, -BOUND, BOUND, 0.0, 0.0, np.inf, 0.0]
    if case.program == "1 add":
        directions_WD *= 1e-3
        row_C = [1.0, 1.0, -np.inf, np.inf, 0.0, 0.0, np.inf, 0.0]
    op_rows_SK = torch.arange(len(directions_WD), dtype=torch.int32, device=device).reshape(case.requests, -1)
    return BankTables(
        op_rows_LSK=op_rows_SK[None],
        op_counts_LS=torch.full((1, case.requests), case.operations, dtype=torch.int32, device=device),
        directions_WD=directions_WD,
        coefficients_WC=torch.tensor([row_C] * len(directions_WD), device=device),
    )


def step_of(case: Case, device: str) -> StepTables:
    """Tables that are filled with the rows of the case; staged rows are not collected."""
    anywhere = np.array([int(case.is_captured)])  # any address but 0, which means no capture
    starts = range(0, case.rows, ROWS_OF_A_REQUEST)
    rows = [RequestRows(str(start), start, min(ROWS_OF_A_REQUEST, case.rows - start), 0) for start in starts]
    requests = [
        PlannedRequest(
            slot=number if case.operations else NO_SLOT,
            steers_L=np.array([case.operations > 0]),
            before_L=np.zeros(1, np.int64),
            after_L=anywhere,
            row_limit=case.rows,
        )
        for number in range(case.requests)
    ]
    step = StepTables(
        rows=case.rows,
        requests=case.requests,
        layers=1,
        width=case.width,
        dtype=torch.bfloat16,
        staging=(2 * case.rows * case.width + 16 * case.requests),
        device=device,
    )
    if case.program != "idle":
        step.fill(build_plan(rows, requests, check_layer=0))
    return step


def check(case: Case, device: str) -> None:
    """Asserts that the result of a launch is that of the formula."""
    torch.manual_seed(0)
    bank, step = bank_of(case, device), step_of(case, device)
    hidden_TD, residual_TD = (torch.randn(case.rows, case.width, device=device, dtype=torch.bfloat16) for _ in range(2))
    stream_TD = hidden_TD.float() + residual_TD.float()
    expected_TD = stream_TD.clone()
    of_row_T = torch.arange(case.rows, device=device) // ROWS_OF_A_REQUEST
    for k in range(case.operations):
        unit_TD = bank.directions_WD[bank.op_rows_LSK[0, of_row_T, k].long()]
        p_T = (expected_TD * unit_TD).sum(dim=1)
        change_T = p_T.clamp(-BOUND, BOUND) - p_T if case.caps else torch.ones_like(p_T)
        expected_TD += change_T[:, None] * unit_TD

    steer_and_capture(hidden_TD, residual_TD, 0, bank, step, checks=False)

    torch.testing.assert_close(hidden_TD.float() + residual_TD.float(), expected_TD, rtol=2**-7, atol=1e-3)
    if case.is_captured:
        captured_TD = step.staging.view(torch.bfloat16)[: case.rows * case.width].reshape(case.rows, case.width)
        torch.testing.assert_close(captured_TD.float(), expected_TD, rtol=2**-7, atol=1e-3)
    assert not step.bad_T.any()


def time_us(launches: Sequence[Callable[[], object]]) -> float:
    """Microseconds per launch: the fastest replay of a graph that holds all launches."""
    for launch in launches:  # compiles and allocates
        launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    times_ms = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times_ms.append(start.elapsed_time(end))
    return 1e3 * min(times_ms) / len(launches)


def kernel_us(case: Case) -> float:
    """Microseconds of one launch of the kernel."""
    bank, step = bank_of(case, "cuda"), step_of(case, "cuda")
    count = count_of(4 * case.rows * case.width)
    pairs = [torch.randn(2, case.rows, case.width, device="cuda").bfloat16() for _ in range(count)]
    best_us = time_us(
        [lambda pair=pair: steer_and_capture(pair[0], pair[1], 0, bank, step, checks=False) for pair in pairs]
    )
    assert not step.bad_T.any()
    return best_us


def copy_us(bytes_moved: int) -> float:
    """Microseconds of a copy that reads and writes `bytes_moved` in total."""
    half = bytes_moved // 2
    pairs = [torch.empty(2, half, device="cuda", dtype=torch.uint8) for _ in range(count_of(bytes_moved))]
    return time_us([lambda pair=pair: pair[0].copy_(pair[1]) for pair in pairs])


def count_of(size: int) -> int:
    """The number of tensors of `size` bytes that a graph reads."""
    return min(max(SPREAD // size, 8), 400)


def main() -> None:
    """Measures all cases and prints the table."""
    if not torch.cuda.is_available():
        sys.exit("bench.kernel_gpu: torch finds no GPU here; nothing was measured")
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("bench.kernel_gpu: TRITON_INTERPRET is set, the kernel would not run on the GPU; nothing was measured")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16, hidden and residual\n")
    print("| rows | hidden size | every row | us | GB/s | copy, us | copy, GB/s | of the copy's speed |")
    print("|---|---|---|---|---|---|---|---|")
    for rows, width, program in product(ROWS, HIDDEN_SIZES, PROGRAMS):
        case = Case(rows=rows, width=width, program=program)
        check(case, "cuda")
        line = f"| {rows} | {width} | {program} | {(us := kernel_us(case)):.1f} |"
        if case.bytes_moved:
            plain_us = copy_us(case.bytes_moved)
            speeds = [case.bytes_moved / 1e3 / each for each in (us, plain_us)]
            line += f" {speeds[0]:.0f} | {plain_us:.1f} | {speeds[1]:.0f} | {speeds[0] / speeds[1]:.2f} |"
        else:
            line += " | | | |"
        print(line, flush=True)


if __name__ == "__main__":
    main()
