"""Norms of rows on the real engine: a row that cannot keep its norm, and what a receipt reports of changes."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from steer_service.core.capture import CaptureSite, CaptureSpec
from steer_service.core.errors import InvalidRequest
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import AddSpec, LayerSteeringSpec, ProjectionCapSpec, SteeringSpec
from steer_service.engine import VLLMSteeringModel
from steer_service.runtime.results import Generation, collect
from tests.engine.conftest import BLOCK
from tests.tiny_models import LAYERS, WIDTH
from tests.vanishing import vanishing

pytestmark = pytest.mark.engine

GREEDY = SamplingOptions(max_tokens=6, temperature=0.0, ignore_eos=True)


def ask(start: int, length: int, steering: SteeringSpec | None = None, **fields: object) -> GenerateRequest:
    prompt = TokenPrompt(token_ids=range(start, start + length))
    return GenerateRequest(**{"prompt": prompt, "sampling": GREEDY, "steering": steering, **fields})


async def run(model: VLLMSteeringModel, request: GenerateRequest) -> Generation:
    return await asyncio.wait_for(collect(model.submit(request)), 300)


def reported(seed: int) -> SteeringSpec:
    """An addition at two layers, and a cap at one of them."""
    vector, direction = np.random.default_rng(seed).normal(size=(2, WIDTH))
    layers = {1: LayerSteeringSpec([AddSpec(vector)]), LAYERS - 1: LayerSteeringSpec([AddSpec(vector)])}
    layers[1] = LayerSteeringSpec([AddSpec(vector), ProjectionCapSpec(direction, min=-0.1, max=0.1, positions=-1)])
    return SteeringSpec(layers, report_change=True)


async def test_a_row_that_becomes_zero_cannot_keep_its_norm_and_fails_its_request_alone(
    llama: VLLMSteeringModel,
) -> None:
    neighbour = ask(5000, 40)
    before = await run(llama, neighbour)
    bad, beside = await asyncio.gather(
        run(llama, ask(5100, 40, vanishing(1, WIDTH))), run(llama, neighbour), return_exceptions=True
    )
    assert isinstance(bad, InvalidRequest)
    assert (bad.reason, bad.field) == ("STEERING_NONFINITE", "steering")
    assert isinstance(beside, Generation)
    assert beside.outputs[0].token_ids == before.outputs[0].token_ids


async def test_a_report_has_the_changes_of_the_captured_rows(llama: VLLMSteeringModel) -> None:
    capture = CaptureSpec(layers=range(LAYERS), site=CaptureSite.BOTH)
    output = (await run(llama, ask(5200, 100, reported(1), capture=capture))).outputs[0]

    assert [change.layer for change in output.receipt.changes] == [1, LAYERS - 1]
    for change in output.receipt.changes:
        before, after = (
            rows[change.layer].astype(np.float64) for rows in (output.captured.before, output.captured.after)
        )
        relative = np.linalg.norm(after - before, axis=1) / np.linalg.norm(before, axis=1)
        assert change.positions == output.receipt.rows_steered == len(relative) == 105
        np.testing.assert_allclose([change.largest, change.mean], [relative.max(), relative.mean()], rtol=1e-5)
    assert [change.capped_positions for change in output.receipt.changes] == [1, 0]


async def test_positions_from_the_prefix_cache_are_not_reported(llama: VLLMSteeringModel) -> None:
    request = ask(5400, 100, reported(2))
    first, second = [(await run(llama, request)).outputs[0].receipt for _ in range(2)]

    assert second.rows_from_prefix_cache == 3 * BLOCK
    assert [change.positions for change in first.changes] == [105, 105]
    assert [change.positions for change in second.changes] == [105 - 3 * BLOCK] * 2
    silent = await run(llama, replace(request, steering=replace(reported(2), report_change=False)))
    assert silent.outputs[0].receipt.rows_from_prefix_cache == 3 * BLOCK  # a report is no part of the program
    assert silent.outputs[0].receipt.changes == ()


async def test_outputs_of_one_request_and_neighbours_have_reports_of_their_own(llama: VLLMSteeringModel) -> None:
    mixed = [
        ask(5600, 30, reported(3), sampling=replace(GREEDY, n=2)),
        ask(5700, 50, replace(reported(3), report_change=False)),
        ask(5800, 70, reported(4)),
        ask(5900, 20),
    ]
    together = await asyncio.gather(*(run(llama, request) for request in mixed))
    counts = [
        [change.positions for change in output.receipt.changes] for answer in together for output in answer.outputs
    ]
    assert counts == [[35, 35], [35, 35], [], [75, 75], []]
