"""torch.compile on: the hooks are traced into the graph and still do the same.

The usual run compiles in test_requests_with_lora_adapters_beside_steered_ones.
"""

import asyncio

import pytest

from steer_service.engine import VLLMSteeringModel
from steer_service.runtime.results import collect
from tests.engine.conftest import ENGINE_ARGUMENTS
from tests.engine.oracle import Oracle, relative_error
from tests.engine.test_numbers import TOLERANCE, mixed_specs, requests_for
from tests.tiny_models import LAYERS

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.extended]


async def test_compiled_steered_rows_equal_the_oracle(model_folder) -> None:
    folder = model_folder("llama")
    oracle = Oracle(folder)
    requests = requests_for(mixed_specs())
    with VLLMSteeringModel(str(folder), **{**ENGINE_ARGUMENTS, "enforce_eager": False, "steer_slots": 16}) as model:
        generations = await asyncio.gather(*[collect(model.submit(request)) for request in requests])
    for request, generation in zip(requests, generations, strict=True):
        output = generation.outputs[0]
        want = oracle.streams([*generation.prompt_token_ids, *output.token_ids][:-1], request.steering)
        for layer in range(LAYERS):
            assert relative_error(output.captures[layer], want[layer]) <= TOLERANCE
