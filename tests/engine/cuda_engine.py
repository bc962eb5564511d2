"""Real vLLM on the CPU with the hooks of a GPU, against the float64 oracle. Run by test_cuda.py."""

from typing import Any

import pytest

from steer_service.core.specs import AblationSpec, AddSpec, LayerSteeringSpec, ProjectionCapSpec, SteeringSpec
from steer_service.engine.worker.hooks_cuda import CudaHooks
from tests.engine.async_scheduling import force_async_scheduling
from tests.engine.in_process import Ask, in_process
from tests.engine.interpreted import INTERPRETED_WORKER
from tests.engine.oracle import Oracle, relative_error
from tests.engine.test_numbers import direction
from tests.tiny_models import LAYERS, ModelFolder

TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05}
"""Of a row: the second is the rounding of the whole model, whose weights the oracle has in float32."""


def asks() -> list[Ask]:
    """Prompts of one and of several steps, decoded together; the second and the last are not steered."""
    add, cap, ablate = (
        AddSpec(direction(1), 2.0),
        ProjectionCapSpec(direction(2), min=-0.1, max=0.3),
        AblationSpec(direction(3), -0.5),
    )
    specs = [
        SteeringSpec(layers={1: LayerSteeringSpec([add])}),
        None,
        SteeringSpec(layers={layer: LayerSteeringSpec([cap, add]) for layer in range(LAYERS)}),
        SteeringSpec(layers={0: LayerSteeringSpec([ablate, add]), 3: LayerSteeringSpec([cap])}),
        None,
    ]
    return [
        Ask([1000 + 37 * index + step for step in range(5 + 11 * index)], 4, spec) for index, spec in enumerate(specs)
    ]


@pytest.fixture
def asynchronous(monkeypatch: pytest.MonkeyPatch) -> None:
    force_async_scheduling(monkeypatch)


def check(folder: Any, dtype: str, *, is_async: bool) -> None:
    oracle = Oracle(folder)
    with in_process(folder, worker_cls=INTERPRETED_WORKER, dtype=dtype) as engine:
        config = engine.llm.llm_engine.vllm_config
        steering = engine.worker.steering
        assert config.scheduler_config.async_scheduling == is_async
        assert isinstance(steering.hooks, CudaHooks)
        answers = engine.run(asks())
        assert steering.hooks.tables.header[0] == 0  # nothing is left behind
    for ask, answer in zip(asks(), answers, strict=True):
        want = oracle.streams(answer.token_ids[:-1], ask.steering)
        for layer in range(LAYERS):
            assert relative_error(answer.streams[layer], want[layer]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_steered_and_captured_rows_of_a_mixed_batch_equal_the_oracle(model_folder: ModelFolder, dtype: str) -> None:
    check(model_folder("llama"), dtype, is_async=False)


@pytest.mark.usefixtures("asynchronous")
def test_rows_equal_the_oracle_under_async_scheduling(model_folder: ModelFolder) -> None:
    check(model_folder("llama"), "float32", is_async=True)
