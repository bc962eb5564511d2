"""Captured rows of a real model are as far from float64 as the model carries its roundings, and no further."""

import numpy as np
import pytest

from steer_client import AsyncSteerClient
from steer_service.core.capture import CaptureSpec
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.hf.bundled_model import ensure_bundled_model
from tests.engine.oracle import Oracle, relative_errors
from tests.engine.sensitivity import bound, prompts, sensitivities
from tests.real_server.serving import run

pytestmark = [pytest.mark.engine, pytest.mark.extended]

CHOSEN = (0, 6)
"""A text, and random tokens, which are as sensitive as any."""


async def test_captured_rows_are_within_the_bound_of_their_sensitivity(client: AsyncSteerClient) -> None:
    folder = ensure_bundled_model()
    oracle, dtype = Oracle(folder), client.info.dtype
    layers = range(client.info.layer_count)
    largest = []
    for tokens in [prompts(folder)[index] for index in CHOSEN]:
        request = GenerateRequest(
            prompt=TokenPrompt(token_ids=tokens),
            sampling=SamplingOptions(max_tokens=1),
            capture=CaptureSpec(layers=layers),
        )
        rows, exact = (await run(client, request)).outputs[0].captures, oracle.streams(tokens, None)
        moved = sensitivities(oracle, tokens, dtype, exact)
        for layer in layers:
            error_T = relative_errors(rows[layer].astype(np.float64), exact[layer])
            assert (error_T <= bound(moved[layer], dtype)).all(), layer
            largest.append(error_T.max())
    assert dtype == "bfloat16"
    assert max(largest) > 0.01  # a bound that no rounding comes near would show nothing
