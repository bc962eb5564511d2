"""Requests whose steering destroys their own stream: they fail alone, and what they wrote changes nobody's answer."""

import asyncio
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from steer_service.core.capture import CaptureSpec
from steer_service.core.errors import InvalidRequest
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import AblationSpec, AddSpec, LayerSteeringSpec, ProjectionCapSpec, SteeringSpec
from steer_service.engine import VLLMSteeringModel
from steer_service.runtime.results import Generation, collect
from tests.engine.conftest import ENGINE_ARGUMENTS
from tests.tiny_models import LAYERS, WIDTH, ModelFolder

pytestmark = pytest.mark.engine

BLOCKS = 64
"""Blocks of the whole KV cache: so few that every block is recycled many times."""

COUNTS = pytest.mark.parametrize("count", [150, pytest.param(500, marks=pytest.mark.extended)])
"""Poison requests, and as many clean ones between them."""

AT_ONCE = 16

PROMPTS = [TokenPrompt(token_ids=range(1000 + 40 * i, 1000 + 40 * i + 30 + i)) for i in range(20)]


LOUDNESS = 8000.0
"""What one layer of the float16 model is scaled by: a huge stream that enters it is infinite when it leaves."""

LOUD = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module", params=[pytest.param("float32", marks=pytest.mark.extended), "float16"])
def model(
    request: pytest.FixtureRequest, model_folder: ModelFolder, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VLLMSteeringModel]:
    folder = model_folder("llama")
    if request.param == "float16":
        folder = loud(folder, tmp_path_factory.mktemp("loud") / "llama")
    arguments = {**ENGINE_ARGUMENTS, "dtype": request.param, "num_gpu_blocks_override": BLOCKS}
    with VLLMSteeringModel(str(folder), **arguments) as model:
        yield model


def loud(folder: Path, copy: Path) -> Path:
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    weights[LOUD] *= LOUDNESS
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def clean(prompt: TokenPrompt) -> GenerateRequest:
    sampling = SamplingOptions(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=1)
    return GenerateRequest(prompt=prompt, sampling=sampling)


def poisons(dtype: str) -> list[SteeringSpec]:
    """Finite specs that pass every check and whose effect is not finite, at a hook or only deeper in the model."""
    direction = np.random.default_rng(5).normal(size=WIDTH)
    ones = np.ones(WIDTH)
    twice = {"float32": 3e38, "float16": 4e4}[dtype]
    specs = [
        SteeringSpec({0: LayerSteeringSpec([AddSpec(ones, twice)]), 2: LayerSteeringSpec([AddSpec(ones, twice)])}),
        SteeringSpec({LAYERS - 1: LayerSteeringSpec([AddSpec(ones, twice), AddSpec(ones, twice)])}),
        SteeringSpec({1: LayerSteeringSpec([AblationSpec(direction, twice), AblationSpec(direction, twice)])}),
    ]
    if dtype == "float16":
        # Finite after the hook, infinite one layer later: two more layers then write NaN as keys and values.
        deep = [SteeringSpec({0: LayerSteeringSpec([AddSpec(ones, scale)])}) for scale in (5.9e4, 6e4, -6e4, 6.1e4)]
        return [*specs, *deep, replace(deep[0], positions=-1)]
    return [
        *specs,
        SteeringSpec.simple_add(0, direction, 1e30),  # finite, but its squares are not: no norm can bear it
        SteeringSpec({2: LayerSteeringSpec([ProjectionCapSpec(direction, min=1e25)])}),
        SteeringSpec.simple_add(1, direction, 1e30, positions=-1),
    ]


async def ask(model: VLLMSteeringModel, request: GenerateRequest) -> Generation:
    return await asyncio.wait_for(collect(model.submit(request)), timeout=120)


def assert_same(got: Generation, want: Generation, dtype: str) -> None:
    """Equal tokens and log-probabilities; in float16 a batch's shape moves both a little."""
    same = [a == b for a, b in zip(got.outputs[0].token_ids, want.outputs[0].token_ids, strict=True)]
    count = same.index(False) if not all(same) else len(same)
    assert dtype == "float16" or all(same)
    atol = {"float32": 1e-5, "float16": 0.1}[dtype]
    np.testing.assert_allclose(logprobs(got)[: count + 1], logprobs(want)[: count + 1], atol=atol)


def logprobs(generation: Generation) -> list[float]:
    return [entry.logprob for entry in generation.outputs[0].logprobs]


async def in_order(model: VLLMSteeringModel, requests: Sequence[GenerateRequest]) -> list[Generation | BaseException]:
    """Answers of all requests, AT_ONCE running at any time, in the order in which they were asked."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(request: GenerateRequest) -> Generation:
        async with gate:
            return await ask(model, request)

    return await asyncio.gather(*map(one, requests), return_exceptions=True)


@COUNTS
async def test_poison_fails_alone_and_changes_no_later_response(model: VLLMSteeringModel, count: int) -> None:
    """Poison and clean requests in turn on a cache of few blocks; every clean answer is what it was before."""
    before = {prompt: await ask(model, clean(prompt)) for prompt in PROMPTS}
    specs = poisons(model.info.dtype)
    turns: list[GenerateRequest] = []
    for i in range(count):
        poison = GenerateRequest(
            prompt=PROMPTS[(7 * i + 3) % len(PROMPTS)],
            steering=specs[i % len(specs)],
            sampling=SamplingOptions(max_tokens=1 + i % 6, temperature=0.0, ignore_eos=True),
        )
        turns += [poison, clean(PROMPTS[i % len(PROMPTS)])]
    answers = await in_order(model, turns)
    refused = [answer for answer in answers[::2] if isinstance(answer, InvalidRequest)]
    assert [error.reason for error in refused] == ["STEERING_NONFINITE"] * count
    for request, answer in zip(turns[1::2], answers[1::2], strict=True):
        assert isinstance(answer, Generation), answer
        assert_same(answer, before[request.prompt], model.info.dtype)


async def test_a_program_that_fails_leaves_the_prefix_cache_of_other_programs(model: VLLMSteeringModel) -> None:
    good = GenerateRequest(
        prompt=TokenPrompt(token_ids=range(3000, 3100)),
        steering=SteeringSpec.simple_add(1, np.ones(WIDTH), 0.5),
        sampling=SamplingOptions(max_tokens=2, temperature=0.0),
    )
    bad = replace(good, steering=poisons(model.info.dtype)[0])
    await ask(model, good)
    for _ in range(3):
        with pytest.raises(InvalidRequest, match="not finite"):
            await ask(model, bad)

        assert (await ask(model, good)).outputs[0].receipt.rows_from_prefix_cache == 96


async def test_poison_of_a_capture_is_refused_too(model: VLLMSteeringModel) -> None:
    for spec in poisons(model.info.dtype):
        request = GenerateRequest(
            prompt=PROMPTS[0],
            steering=spec,
            capture=CaptureSpec(layers=range(LAYERS)),
            sampling=SamplingOptions(max_tokens=3),
        )
        with pytest.raises(InvalidRequest, match="not finite"):
            await ask(model, request)
