"""Priorities on vLLM: what waits with a lower value runs first, and an engine without the policy refuses them."""

import asyncio

import pytest

from steer_service.core.errors import Unsupported
from steer_service.core.events import TokenDelta
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.engine import VLLMSteeringModel
from steer_service.runtime.calls import checked_events
from tests.engine.conftest import ENGINE_ARGUMENTS
from tests.tiny_models import ModelFolder

pytestmark = pytest.mark.engine

LIMIT_S = 120


def ask(priority: int | None, tokens: int = 4) -> GenerateRequest:
    sampling = SamplingOptions(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    return GenerateRequest(prompt=TokenPrompt(token_ids=(5, 6, 7)), sampling=sampling, priority=priority)


async def test_an_engine_without_the_policy_refuses_a_priority(llama: VLLMSteeringModel) -> None:
    assert not llama.has_priority
    with pytest.raises(Unsupported) as refused:
        await llama.complete(ask(0))
    assert (refused.value.field, refused.value.reason) == ("priority", "NO_PRIORITY")


async def test_of_waiting_requests_those_with_lower_values_run_first(model_folder: ModelFolder) -> None:
    arguments = {**ENGINE_ARGUMENTS, "scheduling_policy": "priority", "max_num_seqs": 1}
    order: list[int | None] = []

    async def run(model: VLLMSteeringModel, request: GenerateRequest, first: asyncio.Event) -> None:
        async for event in checked_events(model, request):
            if isinstance(event, TokenDelta):
                first.set()
        order.append(request.priority)

    with VLLMSteeringModel(str(model_folder("llama")), **arguments) as model:
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
            running = asyncio.Event()
            tasks.create_task(run(model, ask(-9, tokens=400), running))
            await running.wait()
            for priority in (5, 0, None, -4):
                tasks.create_task(run(model, ask(priority), asyncio.Event()))

    assert order[:2] == [-9, -4]
    assert order[-1] == 5
