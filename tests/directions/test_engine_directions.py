"""Directions and the likelihood of targets on the engine, which is another backend with the same calls."""

from collections.abc import Iterator

import pytest

from steer_service.core.specs import SteeringSpec
from steer_service.directions.rows import RowChoice
from steer_service.engine import VLLMSteeringModel
from steer_service.hf.model import HFSteeringModel
from tests.directions.agreement import CHOICES, STEERINGS, assert_rows_agree, assert_targets_agree
from tests.engine.conftest import ENGINE_ARGUMENTS
from tests.tiny_models import ModelFolder

pytestmark = [pytest.mark.engine, pytest.mark.extended]


@pytest.fixture(scope="module")
def engine(model_folder: ModelFolder) -> Iterator[VLLMSteeringModel]:
    with VLLMSteeringModel(str(model_folder("llama")), **ENGINE_ARGUMENTS) as model:
        yield model


@pytest.mark.parametrize("choice", CHOICES)
async def test_rows_of_the_engine_are_those_of_transformers(
    hf: HFSteeringModel, engine: VLLMSteeringModel, choice: RowChoice | int
) -> None:
    await assert_rows_agree(hf, engine, choice)


@pytest.mark.parametrize("steering", STEERINGS)
async def test_targets_are_as_likely_on_the_engine(
    hf: HFSteeringModel, engine: VLLMSteeringModel, steering: SteeringSpec | None
) -> None:
    await assert_targets_agree(hf, engine, steering, atol=1e-4)
