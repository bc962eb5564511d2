"""Rows that stand for prompts, captured on a model."""

from collections.abc import Callable

import numpy as np
import pytest

from steer_service.core.errors import InvalidRequest
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.directions import rows
from steer_service.directions.rows import RowChoice, collect_rows
from steer_service.hf.model import HFSteeringModel

PROMPTS = [TokenPrompt(token_ids=tuple(range(700 + index, 703 + 2 * index))) for index in range(5)]


async def all_rows(model: HFSteeringModel, prompt: TokenPrompt, max_tokens: int) -> tuple[np.ndarray, int]:
    sampling = SamplingOptions(max_tokens=max_tokens, min_tokens=2, temperature=0.0)
    (generation,), handles = await model.generate([prompt], sampling, capture_layers=[2], raw_output=True)
    assert handles is not None
    return generation.outputs[0].captures[2], len(prompt.token_ids)


CHOICES: dict[RowChoice, Callable[[np.ndarray, int], np.ndarray]] = {
    RowChoice.LAST_PROMPT: lambda hidden, prompt_tokens: hidden[prompt_tokens - 1],
    RowChoice.MEAN_GENERATED: lambda hidden, prompt_tokens: hidden[prompt_tokens:].mean(0),
}


@pytest.mark.parametrize("choice", RowChoice)
async def test_collected_rows_are_those_of_the_choice(
    hf: HFSteeringModel, monkeypatch: pytest.MonkeyPatch, choice: RowChoice
) -> None:
    monkeypatch.setattr(rows, "PROMPTS_AT_ONCE", 2)
    collected = await collect_rows(hf, PROMPTS, [2, 0], choice, max_tokens=5)
    assert list(collected) == [2, 0]
    assert collected[2].shape == (len(PROMPTS), hf.hidden_size)
    assert collected[2].dtype == np.float32
    for row, prompt in zip(collected[2], PROMPTS, strict=True):
        want = CHOICES[choice](*await all_rows(hf, prompt, 5))
        np.testing.assert_allclose(row, want, rtol=1e-4, atol=1e-4)


async def test_only_the_chosen_rows_are_captured(hf: HFSteeringModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[GenerateRequest] = []
    submit = hf.submit
    monkeypatch.setattr(hf, "submit", lambda request: asked.append(request) or submit(request))
    await collect_rows(hf, PROMPTS[:1], [1])
    assert asked[0].capture.positions.resolve(9, 9) == ((8, 9),)


async def test_without_prompts_or_with_unknown_layers_it_is_refused(hf: HFSteeringModel) -> None:
    with pytest.raises(InvalidRequest, match="no prompts"):
        await collect_rows(hf, [], [0])
    with pytest.raises(InvalidRequest) as refused:
        await collect_rows(hf, PROMPTS, [99])
    assert refused.value.reason == "UNKNOWN_LAYER"
    with pytest.raises(InvalidRequest) as refused:
        await collect_rows(hf, PROMPTS, [0], RowChoice.MEAN_GENERATED, max_tokens=1)
    assert refused.value.field == "min_tokens"
