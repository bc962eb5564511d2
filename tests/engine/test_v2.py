"""vLLM's V2 model runner, with its Triton kernels and ours interpreted on the CPU, in a process of its own."""

import pytest

from tests.engine.test_cuda import run_interpreted

pytest.importorskip("triton")


@pytest.mark.engine
@pytest.mark.slow
def test_the_v2_runner_steers_and_captures_the_right_rows() -> None:
    run_interpreted("v2_engine.py", plugin="tests.engine.interpreted_v2", VLLM_USE_V2_MODEL_RUNNER="1")
