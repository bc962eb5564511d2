"""vLLM's V2 model runner, with its Triton kernels and ours interpreted on the CPU, in a process of its own."""

import pytest

from tests.engine.test_cuda import run_interpreted

pytest.importorskip("triton")
pytestmark = [pytest.mark.engine, pytest.mark.slow]


def run_v2(choice: str) -> None:
    run_interpreted("v2_engine.py", choice, plugin="tests.engine.interpreted_v2", VLLM_USE_V2_MODEL_RUNNER="1")


def test_the_v2_runner_steers_and_captures_the_right_rows() -> None:
    run_v2("not compiled")


@pytest.mark.extended
def test_so_it_does_compiled() -> None:
    run_v2("compiled")
