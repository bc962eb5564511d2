"""Directions and the likelihood of targets through a client: no second copy of the model is needed."""

from collections.abc import AsyncIterator

import numpy as np
import pytest

from steer_client import AsyncSteerClient
from steer_service.core.request import TextPrompt
from steer_service.core.specs import SteeringSpec
from steer_service.hf.directions import RowChoice, collect_rows
from steer_service.hf.model import HFSteeringModel
from steer_service.hf.sweep import target_log_probabilities
from steer_service.hf.training import log_probabilities
from steer_service.server.app import SteerServer
from steer_service.server.config import ServerConfig
from tests.hf.test_target_training import TARGETS
from tests.tiny_models import WIDTH, ModelFolder


@pytest.fixture
async def client(model_folder: ModelFolder) -> AsyncIterator[AsyncSteerClient]:
    server = SteerServer(ServerConfig(address="127.0.0.1:0", grace_s=0.0))
    await server.listen()
    await server.open(HFSteeringModel(model_folder("llama"), name="tiny"))
    async with AsyncSteerClient(server.address) as client:
        yield client
    server.hurry()
    await server.drain()


@pytest.mark.parametrize("choice", RowChoice)
async def test_rows_through_a_client_are_those_of_the_model(
    hf: HFSteeringModel, client: AsyncSteerClient, choice: RowChoice
) -> None:
    prompts = [TextPrompt(text=text) for text in ("The cat sat down.", "A dog barked.")]
    here, served = [await collect_rows(model, prompts, [0, 3], choice) for model in (hf, client)]
    for layer in (0, 3):
        np.testing.assert_allclose(served[layer], here[layer], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steering", [None, SteeringSpec.simple_add(2, np.ones(WIDTH), 2.0)])
async def test_targets_through_a_client_are_as_likely_as_in_the_model(
    hf: HFSteeringModel, client: AsyncSteerClient, steering: SteeringSpec | None
) -> None:
    served = await target_log_probabilities(client, TARGETS, steering)
    np.testing.assert_allclose(served, log_probabilities(hf, TARGETS, steering), atol=1e-5)
