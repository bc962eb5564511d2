"""The GPU's kernel passes what the CPU's does, in Triton's interpreter; what that cannot show needs a GPU.

The interpreter runs the kernel's source on the CPU, one row after the other. It shows neither that a GPU runs it nor
how fast; those tests are skipped where there is no GPU.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from steer_service.core.errors import EngineFailed
from steer_service.ops.cuda_kernel import _hook_kernel, steer_and_capture, warps_for
from steer_service.ops.cuda_tables import HEADER
from steer_service.ops.program import COEFFICIENTS

ROOT = Path(__file__).parents[2]
SUITE = (*(f"tests/ops/test_{name}.py" for name in ("rows", "changes", "conformance")), "tests/ops/cuda_cases.py")
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: not run on one")]
PLACES = pytest.mark.parametrize("kernel", ["interpreted", pytest.param("cuda", marks=NEEDS_GPU)])


def run_with(kernel: str, *arguments: str, cases: int) -> None:
    """Runs tests in a process of their own, whose kernel under test is this one."""
    choice = {"interpreted": "TRITON_INTERPRET", "cuda": "STEERLLM_TEST_CUDA"}[kernel]
    environment = {**os.environ, choice: "1", "STEERLLM_TEST_CASES": str(cases)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    answer = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr


@PLACES
def test_every_row_gets_what_the_tables_on_the_device_say(kernel: str) -> None:
    run_with(kernel, "--hypothesis-profile=few", *SUITE, cases=50)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_benchmark_refuses_to_measure_without_a_gpu() -> None:
    command = [sys.executable, "-m", "bench.kernel_gpu"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert answer.returncode == 1
    assert "no GPU here; nothing was measured" in answer.stderr
    assert answer.stdout == ""


@pytest.mark.extended
@pytest.mark.timeout(7200)  # the interpreter takes half an hour
@PLACES
def test_all_cases_keep_the_contract(kernel: str) -> None:
    run_with(kernel, "-o", "timeout=7200", *SUITE, cases=10_000)


@pytest.mark.parametrize("capability", [75, 80, 90])
@pytest.mark.parametrize(("element", "width"), [("bf16", 4096), ("fp16", 576), ("fp32", 37)])
def test_it_compiles_for_gpus_that_are_not_here(element: str, width: int, capability: int) -> None:
    constants = {
        "HAS_RESIDUAL": True,
        "CHECKS": True,
        "OPERATIONS": 8,
        "ROWS": HEADER,
        "COEFFICIENTS": COEFFICIENTS,
        "WIDTH": width,
        "BLOCK": triton.next_power_of_2(width),
        "NARROW_LINE": 4 if element == "fp32" else 8,
    }
    tables = dict.fromkeys(("hidden", "residual", "staging"), f"*{element}")
    tables |= dict.fromkeys(("changes_TLC", "staging_wide", "directions_WD", "coefficients_WC"), "*fp32") | {
        "bad_T": "*u8",
        "header_wide": "*i64",
    }
    numbers = dict.fromkeys(("layer", "slots", "layers"), "i32")
    types = dict.fromkeys(_hook_kernel.arg_names, "*i32") | tables | numbers | dict.fromkeys(constants, "constexpr")

    built = triton.compile(
        ASTSource(_hook_kernel, types, constexprs=constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps_for(width)},
    )

    assert built.asm["cubin"]


@pytest.mark.parametrize("lanes", [32, 64])
@pytest.mark.parametrize("width", [37, 576, 4096, 8192, 16384, 65536])
def test_a_row_has_at_most_the_threads_that_a_gpu_allows(width: int, lanes: int) -> None:
    threads = lanes * warps_for(width, lanes)
    assert threads <= 1024
    assert threads in (4 * lanes, 1024) or width <= 32 * threads < 2 * width + 32 * lanes


@pytest.mark.parametrize(
    "hidden_TD",
    [
        torch.zeros(3, 8, dtype=torch.float64),
        torch.zeros(3, 9),
        torch.zeros(5, 8),
        torch.zeros(3, 16)[:, ::2],
    ],
    ids=["dtype", "width", "rows", "stride"],
)
def test_a_stream_that_the_kernel_would_misread_is_refused(hidden_TD: torch.Tensor) -> None:
    tables: Any = SimpleNamespace(dtype=torch.float32, width=8, rows=4)
    right_TD = torch.zeros(len(hidden_TD), 8)
    for streams in ((hidden_TD, None), (hidden_TD, right_TD), (right_TD, hidden_TD)):
        with pytest.raises(EngineFailed, match="a layer returned") as refused:
            steer_and_capture(*streams, 0, None, tables, checks=False)
        assert refused.value.reason == "WRONG_STREAM"


def test_the_module_can_be_imported_without_triton_and_launches_are_refused() -> None:
    program = (
        "import sys; sys.modules['triton'] = None; import torch\n"
        "from steer_service.core.errors import Unsupported\n"
        "from steer_service.ops.cuda_kernel import steer_and_capture\n"
        "try: steer_and_capture(torch.zeros(1, 1), None, 0, None, None, checks=False)\n"
        "except Unsupported as error: print(error.reason)\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["TRITON_MISSING"]
