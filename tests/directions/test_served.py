"""Directions and the likelihood of targets through a client: no second copy of the model is needed."""

from collections.abc import AsyncIterator

import pytest

from steer_client import AsyncSteerClient
from steer_service.core.specs import SteeringSpec
from steer_service.directions.rows import RowChoice
from steer_service.hf.model import HFSteeringModel
from steer_service.server.app import SteerServer
from steer_service.server.config import ServerConfig
from tests.directions.agreement import CHOICES, STEERINGS, assert_rows_agree, assert_targets_agree
from tests.tiny_models import ModelFolder


@pytest.fixture
async def client(model_folder: ModelFolder) -> AsyncIterator[AsyncSteerClient]:
    server = SteerServer(ServerConfig(address="127.0.0.1:0", grace_s=0.0))
    await server.listen()
    await server.open(HFSteeringModel(model_folder("llama"), name="tiny"))
    async with AsyncSteerClient(server.address) as client:
        yield client
    server.stop_now()
    await server.drain()


@pytest.mark.parametrize("choice", CHOICES)
async def test_rows_through_a_client_are_those_of_the_model(
    hf: HFSteeringModel, client: AsyncSteerClient, choice: RowChoice | int
) -> None:
    await assert_rows_agree(hf, client, choice)


@pytest.mark.parametrize("steering", STEERINGS)
async def test_targets_through_a_client_are_as_likely_as_in_the_model(
    hf: HFSteeringModel, client: AsyncSteerClient, steering: SteeringSpec | None
) -> None:
    await assert_targets_agree(hf, client, steering, atol=1e-5)
