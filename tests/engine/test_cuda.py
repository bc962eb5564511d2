"""The engine with the hooks of a GPU, in Triton's interpreter on the CPU, in a process of its own.

It shows that the right rows are steered, captured and marked, whatever is under way; no graph is recorded, and no
stream runs beside another: that needs a GPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


def run_interpreted(file: str, choice: str = "", *, marks: str = "", plugin: str = "", **environment: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        "-k",
        choice,
        "-m",
        marks,
    ]
    command += ["-p", plugin] if plugin else []
    command.append(f"tests/engine/{file}")
    environment = {**os.environ, "TRITON_INTERPRET": "1", **environment}
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "skipped" not in answer.stdout


def test_passes_are_filled_and_collected_in_order() -> None:
    run_interpreted("cuda_passes.py")


def test_the_proof_of_the_kernel_finds_nothing_wrong_with_the_kernel_of_a_gpu() -> None:
    run_interpreted("worker/test_kernel_proof.py", "not faulty_kernel")


def test_the_proof_of_a_device_without_a_model_passes_with_the_hooks_of_a_gpu() -> None:
    run_interpreted("worker/test_device_proof.py")


@pytest.mark.engine
@pytest.mark.extended
@pytest.mark.parametrize("choice", ["mixed_batch and float32", "mixed_batch and bfloat16", "async_scheduling"])
def test_rows_equal_the_oracle_on_real_vllm(choice: str) -> None:
    run_interpreted("cuda_engine.py", choice)
