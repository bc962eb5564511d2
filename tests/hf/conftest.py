"""The backend on the tiny Llama."""

from collections.abc import Iterator

import pytest
import torch

from steer_service.hf.model import HFSteeringModel
from tests.tiny_models import ModelFolder


@pytest.fixture(scope="module")
def hf(model_folder: ModelFolder) -> Iterator[HFSteeringModel]:
    with HFSteeringModel(model_folder("llama"), name="tiny", dtype=torch.float32) as model:
        yield model
