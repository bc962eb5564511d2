"""Directions and the likelihood of targets on the engine, which is another backend with the same calls."""

from collections.abc import Iterator

import numpy as np
import pytest

from steer_service.core.request import TextPrompt
from steer_service.core.specs import SteeringSpec
from steer_service.engine import VLLMSteeringModel
from steer_service.hf.directions import RowChoice, collect_rows
from steer_service.hf.model import HFSteeringModel
from steer_service.hf.sweep import target_log_probabilities
from steer_service.hf.training import log_probabilities
from tests.engine.conftest import ENGINE_ARGUMENTS
from tests.hf.test_target_training import TARGETS
from tests.tiny_models import WIDTH, ModelFolder

pytestmark = [pytest.mark.engine, pytest.mark.thorough]


@pytest.fixture(scope="module")
def engine(model_folder: ModelFolder) -> Iterator[VLLMSteeringModel]:
    with VLLMSteeringModel(str(model_folder("llama")), **ENGINE_ARGUMENTS) as model:
        yield model


@pytest.mark.parametrize("choice", RowChoice)
async def test_rows_of_the_engine_are_those_of_transformers(
    hf: HFSteeringModel, engine: VLLMSteeringModel, choice: RowChoice
) -> None:
    prompts = [TextPrompt(text=text) for text in ("The cat sat down.", "A dog barked.")]
    here, there = [await collect_rows(model, prompts, [0, 3], choice) for model in (hf, engine)]
    for layer in (0, 3):
        np.testing.assert_allclose(there[layer], here[layer], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steering", [None, SteeringSpec.simple_add(2, np.ones(WIDTH), 2.0)])
async def test_targets_are_as_likely_on_the_engine(
    hf: HFSteeringModel, engine: VLLMSteeringModel, steering: SteeringSpec | None
) -> None:
    there = await target_log_probabilities(engine, TARGETS, steering)
    np.testing.assert_allclose(there, log_probabilities(hf, TARGETS, steering), atol=1e-4)
