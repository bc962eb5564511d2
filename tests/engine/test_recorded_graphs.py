"""The proof at start and requests, where both of vLLM's model runners replay recorded graphs; in a process each.

The recordings are a stand-in for CUDA graphs, see recorder.py: a replay calls no hook, and repeats the launches
of the kernel on the memory that they had. It shows neither a GPU's streams nor its memory.
"""

import pytest

from tests.engine.test_cuda import run_interpreted

pytest.importorskip("triton")
pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_the_v1_runner_replays_graphs() -> None:
    run_interpreted("recorded_engine.py")


def test_the_v2_runner_replays_graphs() -> None:
    run_interpreted("recorded_engine.py", plugin="tests.engine.interpreted_v2", VLLM_USE_V2_MODEL_RUNNER="1")
