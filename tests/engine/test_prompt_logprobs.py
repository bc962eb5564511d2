"""Log-probabilities of prompts on vLLM: prompts of several steps, cached prefixes, several outputs, and the order."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from steer_service.core.capture import CaptureSpec
from steer_service.core.events import Event, FinishReason, PromptLogprobs, Started, TokenDelta
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import SteeringSpec
from steer_service.engine import VLLMSteeringModel
from steer_service.runtime.calls import checked_events
from steer_service.runtime.results import Generation, collect
from tests.engine.oracle import Oracle
from tests.tiny_models import WIDTH, ModelFolder

pytestmark = pytest.mark.engine

PROMPT = tuple(range(3000, 3200))
"""Takes several steps of 64 tokens."""
SCORED = SamplingOptions(max_tokens=2, temperature=0.0, ignore_eos=True, prompt_logprobs=2)
STEERING = SteeringSpec.simple_add(1, np.random.default_rng(5).normal(size=WIDTH), 0.5)
CLOSE = 1e-4


def ask(**fields: object) -> GenerateRequest:
    return GenerateRequest(**{"prompt": TokenPrompt(token_ids=PROMPT), "sampling": SCORED, **fields})


async def run(model: VLLMSteeringModel, request: GenerateRequest) -> Generation:
    return await asyncio.wait_for(collect(checked_events(model, request)), 120)


@pytest.fixture(scope="module")
def oracle(model_folder: ModelFolder) -> Oracle:
    return Oracle(model_folder("llama"))


@pytest.mark.parametrize("steering", [None, STEERING, replace(STEERING, positions=range(90, 150))])
async def test_scores_of_a_prompt_in_several_steps_are_those_of_transformers_whatever_is_cached(
    llama: VLLMSteeringModel, oracle: Oracle, steering: SteeringSpec | None
) -> None:
    plain = ask(steering=steering, sampling=replace(SCORED, prompt_logprobs=None))
    await run(llama, plain)
    assert (await run(llama, plain)).usage.cached_tokens > 0
    generation = await run(llama, ask(steering=steering))

    assert generation.usage.cached_tokens == 0
    scores = generation.prompt_logprobs
    assert (len(scores), scores[0]) == (len(PROMPT), None)
    want = oracle.logprobs([*PROMPT, 0], steering, prompt_tokens=1)[:-1]
    np.testing.assert_allclose([entry.logprob for entry in scores[1:]], want, atol=CLOSE)
    assert all(len(entry.top) == 2 and entry.top[0][1] >= entry.top[1][1] for entry in scores[1:])


async def test_neighbours_of_scored_prompts_are_cached_and_scores_do_not_mix(llama: VLLMSteeringModel) -> None:
    others = [ask(sampling=replace(SCORED, prompt_logprobs=count)) for count in (0, 5, None)]
    alone, *rest = [await run(llama, request) for request in (ask(), *others)]
    together = await asyncio.gather(*[run(llama, request) for request in (ask(), *others)])

    for mine, other in zip([alone, *rest], together, strict=True):
        scores = [entry.logprob for entry in mine.prompt_logprobs[1:]]
        np.testing.assert_allclose(scores, [entry.logprob for entry in other.prompt_logprobs[1:]], atol=CLOSE)
    assert [len(one.prompt_logprobs[7].top) for one in together[:3]] == [2, 0, 5]
    assert together[3].prompt_logprobs == []


async def test_scores_come_once_before_every_token_of_all_outputs(llama: VLLMSteeringModel) -> None:
    capture = CaptureSpec(layers=(2,), positions=range(150, 160))
    request = ask(steering=STEERING, capture=capture, sampling=replace(SCORED, n=3, temperature=1.0, seed=1))
    events: list[Event] = [event async for event in checked_events(llama, request)]

    assert [type(event) for event in events[:2]] == [Started, PromptLogprobs]
    assert sum(isinstance(event, PromptLogprobs) for event in events) == 1
    assert {event.output_index for event in events if isinstance(event, TokenDelta)} == {0, 1, 2}


async def test_a_prompt_of_one_token_has_no_score(llama: VLLMSteeringModel) -> None:
    generation = await run(llama, ask(prompt=TokenPrompt(token_ids=(7,))))

    assert generation.prompt_logprobs == [None]


async def test_a_time_budget_that_ends_before_the_first_token_leaves_no_score(llama: VLLMSteeringModel) -> None:
    generation = await run(llama, ask(time_budget_s=1e-6))

    assert generation.outputs[0].finish_reason is FinishReason.TIME_BUDGET
    assert generation.prompt_logprobs == [None]
