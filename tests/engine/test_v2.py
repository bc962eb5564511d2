"""vLLM's V2 model runner, with its Triton kernels and ours interpreted on the CPU, in a process of its own."""

import pytest

from tests.engine.test_cuda import run_interpreted

pytest.importorskip("triton")
pytestmark = [pytest.mark.engine, pytest.mark.slow]


def run_v2(*, extended: bool) -> None:
    marks = "extended" if extended else "not extended"
    run_interpreted("v2_engine.py", marks=marks, plugin="tests.engine.interpreted_v2", VLLM_USE_V2_MODEL_RUNNER="1")


def test_the_v2_runner_steers_and_captures_the_right_rows() -> None:
    run_v2(extended=False)


@pytest.mark.extended
def test_the_v2_runner_steers_and_captures_the_right_rows_when_compiled_and_with_the_hooks_of_a_cpu() -> None:
    run_v2(extended=True)
