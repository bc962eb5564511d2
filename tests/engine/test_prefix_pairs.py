"""Pairs of prompt and steering: none reuses another's prefix from the cache, each reuses its own."""

import asyncio
import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import AblationSpec, AddSpec, LayerSteeringSpec, ProjectionCapSpec, SteeringSpec
from steer_service.engine import VLLMSteeringModel
from steer_service.runtime.results import Generation, collect
from tests.engine.conftest import BLOCK
from tests.tiny_models import WIDTH

pytestmark = pytest.mark.engine

PROMPTS = pytest.mark.parametrize("prompts", [5, pytest.param(25, marks=pytest.mark.extended)])
STEERINGS = 20
AT_ONCE = 50
"""Pairs asked together, and again together while all their blocks are still in the cache."""

PROMPT = 2 * BLOCK + 6


def steerings() -> list[SteeringSpec | None]:
    """All different, many by little: a scale, a layer, an order, a bound, the rows."""
    rng = np.random.default_rng(11)
    one, two = rng.normal(size=WIDTH), rng.normal(size=WIDTH)
    add, cap, ablate = AddSpec(one, 2.0), ProjectionCapSpec(two, max=0.5), AblationSpec(two)

    def spec(*operations: object, layer: int = 1, positions: object = None) -> SteeringSpec:
        return SteeringSpec({layer: LayerSteeringSpec(operations)}, positions=positions)

    specs = [
        None,
        spec(add),
        spec(AddSpec(one, 2.0000002)),
        spec(AddSpec(one, -2.0)),
        spec(AddSpec(two, 2.0)),
        spec(add, layer=0),
        spec(add, layer=3),
        spec(cap),
        spec(ProjectionCapSpec(two, max=0.6)),
        spec(ProjectionCapSpec(two, min=-0.5, max=0.5)),
        spec(ablate),
        spec(AblationSpec(two, 0.5)),
        spec(add, cap),
        spec(cap, add),
        spec(add, add),
        spec(add, positions="prompt"),
        spec(add, positions="generated"),
        spec(add, positions=-1),
        spec(add, positions=range(3, 40)),
        SteeringSpec({1: LayerSteeringSpec([add]), 2: LayerSteeringSpec([add])}),
    ]
    assert len(specs) == STEERINGS
    return specs


def ask(salt: str, prompt: int, steering: SteeringSpec | None) -> GenerateRequest:
    start = 10_000 + 100 * prompt
    return GenerateRequest(
        prompt=TokenPrompt(token_ids=range(start, start + PROMPT)),
        steering=steering,
        sampling=SamplingOptions(max_tokens=2, temperature=0.0, ignore_eos=True, logprobs=0),
        cache_salt=salt,  # apart from what other tests ask this engine
    )


async def run(model: VLLMSteeringModel, requests: Sequence[GenerateRequest]) -> list[Generation]:
    answers = asyncio.gather(*[collect(model.submit(request)) for request in requests])
    return await asyncio.wait_for(answers, timeout=300)


@PROMPTS
async def test_pairs_of_prompt_and_steering_reuse_their_own_prefix_only(llama: VLLMSteeringModel, prompts: int) -> None:
    pairs = [ask(f"{prompts} prompts", *pair) for pair in itertools.product(range(prompts), steerings())]
    np.random.default_rng(12).shuffle(pairs)
    assert len(pairs) == prompts * STEERINGS
    for start in range(0, len(pairs), AT_ONCE):
        group = pairs[start : start + AT_ONCE]
        first, second = await run(llama, group), await run(llama, group)
        assert {generation.usage.cached_tokens for generation in first} == {0}
        assert {generation.usage.cached_tokens for generation in second} == {2 * BLOCK}
        for once, again in zip(first, second, strict=True):
            logprobs = [[entry.logprob for entry in g.outputs[0].logprobs] for g in (once, again)]
            np.testing.assert_allclose(*logprobs, atol=1e-5)
