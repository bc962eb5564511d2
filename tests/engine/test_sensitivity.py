"""Captured rows of the tiny model in float32, against float64: within the bound that docs/numerics.md states."""

import asyncio

import numpy as np
import pytest

from steer_service.core.capture import CaptureSpec
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.engine import VLLMSteeringModel
from steer_service.runtime.results import collect
from tests.engine.oracle import Oracle, relative_errors
from tests.engine.sensitivity import UNITS, bound, prompts, sensitivities
from tests.tiny_models import LAYERS, ModelFolder


@pytest.mark.engine
async def test_captured_rows_are_within_the_bound_of_their_sensitivity(
    llama: VLLMSteeringModel, model_folder: ModelFolder
) -> None:
    folder = model_folder("llama")
    oracle, asked = Oracle(folder), prompts(folder)
    sampling, capture = SamplingOptions(max_tokens=1), CaptureSpec(layers=range(LAYERS))
    generations = await asyncio.gather(
        *(
            collect(
                llama.submit(GenerateRequest(prompt=TokenPrompt(token_ids=one), sampling=sampling, capture=capture))
            )
            for one in asked
        )
    )
    for tokens, generation in zip(asked, generations, strict=True):
        rows, exact = generation.outputs[0].captures, oracle.streams(tokens, None)
        moved = sensitivities(oracle, tokens, "float32", exact)
        for layer in range(LAYERS):
            assert (relative_errors(rows[layer], exact[layer]) <= bound(moved[layer], "float32")).all(), layer


def test_the_sensitivity_of_a_row_is_that_of_its_model_to_one_rounding(model_folder: ModelFolder) -> None:
    folder = model_folder("llama")
    oracle, tokens = Oracle(folder), prompts(folder)[0]
    exact = oracle.streams(tokens, None)

    for dtype, unit in UNITS.items():
        moved = sensitivities(oracle, tokens, dtype, exact)
        assert all((moved[layer] > unit / 10).all() for layer in range(LAYERS))
        assert np.median(moved[LAYERS - 1]) >= np.median(moved[0])  # roundings of later layers come on top
