"""An engine with several names of its model."""

import pytest

from steer_service.core.errors import NotFound
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.engine import VLLMSteeringModel
from tests.engine.conftest import ENGINE_ARGUMENTS
from tests.tiny_models import ModelFolder

pytestmark = pytest.mark.engine


async def test_a_model_with_several_names_answers_to_each(model_folder: ModelFolder) -> None:
    arguments = {**ENGINE_ARGUMENTS, "served_model_name": ["mine", "alias", "mine"]}
    with VLLMSteeringModel(str(model_folder("llama")), **arguments) as model:
        assert (model.info.name, model.info.aliases) == ("mine", ("alias",))
        sampling = SamplingOptions(max_tokens=1, temperature=0.0)
        for name in ("", "mine", "alias"):
            await model.complete(GenerateRequest(prompt=TokenPrompt(token_ids=(5,)), sampling=sampling, model=name))
        with pytest.raises(NotFound):
            await model.complete(GenerateRequest(prompt=TokenPrompt(token_ids=(5,)), sampling=sampling, model="other"))
