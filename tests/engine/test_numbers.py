"""Steered and captured rows against the float64 oracle, in mixed batches on real vLLM."""

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from steer_service.core.capture import CaptureSpec
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import AblationSpec, AddSpec, LayerSteeringSpec, ProjectionCapSpec, SteeringSpec
from steer_service.engine import VLLMSteeringModel
from steer_service.runtime.results import Generation, collect
from tests.engine.conftest import ENGINE_ARGUMENTS
from tests.engine.oracle import Oracle, relative_error
from tests.tiny_models import LAYERS, WIDTH

pytestmark = pytest.mark.engine

TOLERANCE = 1e-5
TOKENS = 12


def direction(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=WIDTH)


def mixed_specs() -> list[SteeringSpec | None]:
    """Unsteered twice, each operation, all three in two orders, two layers, all layers."""
    add, cap, ablate = (
        AddSpec(direction(1), 2.0),
        ProjectionCapSpec(direction(2), min=-0.1, max=0.3),
        AblationSpec(direction(3), -0.5),
    )
    return [
        None,
        SteeringSpec(layers={1: LayerSteeringSpec([add])}),
        SteeringSpec(layers={1: LayerSteeringSpec([cap])}),
        SteeringSpec(layers={1: LayerSteeringSpec([ablate])}),
        SteeringSpec(layers={2: LayerSteeringSpec([add, cap, ablate])}),
        SteeringSpec(layers={2: LayerSteeringSpec([ablate, cap, add])}),
        SteeringSpec(layers={0: LayerSteeringSpec([ablate, add]), 3: LayerSteeringSpec([cap])}),
        SteeringSpec(layers={layer: LayerSteeringSpec([cap, add]) for layer in range(LAYERS)}),
        None,
    ]


def requests_for(specs: Sequence[SteeringSpec | None], *, capture: bool = True) -> list[GenerateRequest]:
    return [
        GenerateRequest(
            prompt=TokenPrompt(token_ids=[1000 + 37 * index + step for step in range(5 + 9 * index)]),
            sampling=SamplingOptions(max_tokens=TOKENS, temperature=0.0, ignore_eos=True, logprobs=0),
            steering=spec,
            capture=CaptureSpec(layers=range(LAYERS)) if capture else None,
        )
        for index, spec in enumerate(specs)
    ]


async def run_as_one_batch(model: VLLMSteeringModel, requests: Sequence[GenerateRequest]) -> list[Generation]:
    """Holds the scheduler back until every request has arrived, so that each run has the same steps."""
    llm = model._engine._services.llm

    async def run() -> list[Generation]:
        await llm.pause_generation(mode="keep", clear_cache=False)
        tasks = [asyncio.ensure_future(collect(model._engine.submit(request))) for request in requests]
        while llm.get_num_unfinished_requests() < len(requests):
            await asyncio.sleep(0.01)
        await llm.resume_generation()
        return await asyncio.gather(*tasks)

    return await asyncio.wait_for(model._thread.call(run()), timeout=300)


@pytest.fixture(scope="module", params=["llama", pytest.param("qwen3", marks=pytest.mark.extended)])
def family(request: pytest.FixtureRequest, model_folder) -> Iterator[tuple[VLLMSteeringModel, Path]]:  # type: ignore[no-untyped-def]
    folder = model_folder(request.param)
    if request.param == "llama":
        yield request.getfixturevalue("llama"), folder
    else:
        with VLLMSteeringModel(str(folder), **{**ENGINE_ARGUMENTS, "steer_slots": 16}) as model:
            yield model, folder


async def test_steered_rows_of_a_mixed_batch_equal_the_oracle(family) -> None:  # type: ignore[no-untyped-def]
    model, folder = family
    oracle = Oracle(folder)
    requests = requests_for(mixed_specs())
    generations = await run_as_one_batch(model, requests)
    for request, generation in zip(requests, generations, strict=True):
        output = generation.outputs[0]
        tokens = [*generation.prompt_token_ids, *output.token_ids]
        want = oracle.streams(tokens[:-1], request.steering)
        for layer in range(LAYERS):
            assert relative_error(output.captures[layer], want[layer]) <= TOLERANCE
        logprobs = oracle.logprobs(tokens, request.steering, len(generation.prompt_token_ids))
        np.testing.assert_allclose([entry.logprob for entry in output.logprobs], logprobs, atol=1e-4)
        assert output.receipt.steering_digest == (request.steering.digest() if request.steering else "")
        assert output.receipt.rows_captured == output.receipt.rows_total == len(tokens) - 1
        assert output.receipt.rows_steered == (len(tokens) - 1 if request.steering else 0)


async def test_unsteered_neighbours_are_bit_identical_to_a_batch_with_nothing_steered(family) -> None:  # type: ignore[no-untyped-def]
    model, _ = family
    specs = mixed_specs()
    steered = await run_as_one_batch(model, requests_for(specs))
    plain = await run_as_one_batch(model, requests_for([None] * len(specs)))
    changed = 0
    for index, spec in enumerate(specs):
        ours, theirs = steered[index].outputs[0], plain[index].outputs[0]
        if spec is not None:
            changed += ours.logprobs != theirs.logprobs
            continue
        assert ours.token_ids == theirs.token_ids
        assert ours.logprobs == theirs.logprobs
        for layer in range(LAYERS):
            assert ours.captures[layer].tobytes() == theirs.captures[layer].tobytes()
    assert changed == len(specs) - 2  # the steering of the others did something


async def test_an_unsteered_request_of_a_mixed_batch_equals_its_run_alone(family) -> None:  # type: ignore[no-untyped-def]
    model, _ = family
    requests = requests_for(mixed_specs())
    together = await asyncio.gather(*[collect(model.submit(request)) for request in requests])
    alone = await collect(model.submit(requests[0]))
    assert alone.outputs[0].token_ids == together[0].outputs[0].token_ids
    np.testing.assert_allclose(
        [entry.logprob for entry in alone.outputs[0].logprobs],
        [entry.logprob for entry in together[0].outputs[0].logprobs],
        atol=1e-5,
    )
