"""Models that tests of checkpoints load steering into."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from steer_service.hf.model import HFSteeringModel
    from tests.tiny_models import ModelFolder


@pytest.fixture
def fresh(model_folder: "ModelFolder") -> "Callable[..., HFSteeringModel]":
    import torch  # here: tests of files without models run where torch is not installed

    from steer_service.hf.model import HFSteeringModel

    def make(**options: Any) -> HFSteeringModel:
        return HFSteeringModel(model_folder("llama"), name="tiny", dtype=torch.float32, **options)

    return make
