"""Rows that stand for prompts, captured on a model."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from steer_service.core.errors import InvalidRequest, Unsupported
from steer_service.core.prompt import ChatMessage, ChatPrompt, TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.directions import rows
from steer_service.directions.rows import RowChoice, collect_rows, row_choice_from
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


@pytest.mark.parametrize("choice", [*CHOICES, 0, -2])
async def test_collected_rows_are_those_of_the_choice(
    hf: HFSteeringModel, monkeypatch: pytest.MonkeyPatch, choice: RowChoice | int
) -> None:
    monkeypatch.setattr(rows, "PROMPTS_AT_ONCE", 2)
    collected = await collect_rows(hf, PROMPTS, [2, 0], choice, max_tokens=5)
    assert list(collected) == [2, 0]
    assert collected[2].shape == (len(PROMPTS), hf.hidden_size)
    assert collected[2].dtype == np.float32
    for row, prompt in zip(collected[2], PROMPTS, strict=True):
        hidden, prompt_tokens = await all_rows(hf, prompt, 5)
        is_position = isinstance(choice, int)
        want = hidden[choice % prompt_tokens] if is_position else CHOICES[choice](hidden, prompt_tokens)
        np.testing.assert_allclose(row, want, rtol=1e-4, atol=1e-4)


class WithoutOffsets:
    """The tokenizer, as one that does not tell where its tokens are."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def chat(answer: str, **options: Any) -> ChatPrompt:
    messages = (
        ChatMessage(role="user", content="(A) Yes or (B) No"),
        ChatMessage(role="assistant", content=answer),
    )
    return ChatPrompt(messages=messages, **options)


async def states_of(model: HFSteeringModel, text: str, layer: int) -> tuple[np.ndarray, list[int]]:
    """The rows after a layer of a text that has its template already, by transformers, and its tokens."""
    token_ids = model.tokenizer.encode(text, add_special_tokens=False)
    with torch.no_grad():
        states = model.model(input_ids=torch.tensor([token_ids]), output_hidden_states=True).hidden_states
    return states[layer + 1][0].numpy(), token_ids


def rendered(model: HFSteeringModel, prompt: ChatPrompt, **options: Any) -> str:
    messages = [{"role": one.role, "content": one.content} for one in prompt.messages]
    return model.tokenizer.apply_chat_template(messages, tokenize=False, **options)


@pytest.mark.parametrize("is_open", [True, False])
async def test_the_mean_of_the_last_message_has_neither_header_nor_end(hf: HFSteeringModel, is_open: bool) -> None:
    prompt = chat("(A) Yes", continue_final_message=is_open, add_generation_prompt=None if is_open else False)
    text = rendered(hf, prompt, continue_final_message=is_open)
    states, token_ids = await states_of(hf, text, 2)
    before = len(hf.tokenizer.encode(text[: text.rindex("(A) Yes")], add_special_tokens=False))
    answer = len(hf.tokenizer.encode("(A) Yes", add_special_tokens=False))
    assert hf.tokenizer.decode(token_ids[before : before + answer]) == "(A) Yes"
    assert (before + answer == len(token_ids)) is is_open
    [row] = (await collect_rows(hf, [prompt], [2], RowChoice.LAST_MESSAGE))[2]
    np.testing.assert_allclose(row, states[before : before + answer].mean(0), rtol=1e-4, atol=1e-5)


async def test_the_letter_of_an_answer_is_the_last_token_but_one(hf: HFSteeringModel) -> None:
    prompt = chat("(A)", continue_final_message=True)
    states, token_ids = await states_of(hf, rendered(hf, prompt, continue_final_message=True), 2)
    assert [hf.tokenizer.decode([one]) for one in token_ids[-3:]] == ["(", "A", ")"]
    [row] = (await collect_rows(hf, [prompt], [2], -2))[2]
    np.testing.assert_allclose(row, states[-2], rtol=1e-4, atol=1e-5)


async def test_a_row_that_a_prompt_does_not_have_is_refused_with_the_prompt(hf: HFSteeringModel) -> None:
    for position in (-5, 5):
        with pytest.raises(InvalidRequest) as refused:
            await collect_rows(hf, [PROMPTS[4], PROMPTS[0]], [0], position)
        assert refused.value.field.startswith("prompts[1].capture.positions")
    with pytest.raises(InvalidRequest, match="not a chat") as refused:
        await collect_rows(hf, PROMPTS[:1], [0], RowChoice.LAST_MESSAGE, names=["line 7.positive"])
    assert refused.value.field.startswith("line 7.positive.")
    with HFSteeringModel(hf.model, name="slow", tokenizer=WithoutOffsets(hf.tokenizer)) as slow:  # type: ignore[arg-type]
        with pytest.raises(Unsupported, match="does not tell where its tokens are"):
            await collect_rows(slow, [chat("(A)")], [0], RowChoice.LAST_MESSAGE)


@pytest.mark.parametrize(("text", "choice"), [("last-message", RowChoice.LAST_MESSAGE), ("-2", -2), ("0", 0)])
def test_a_choice_is_written_as_its_name_or_its_position(text: str, choice: RowChoice | int) -> None:
    assert row_choice_from(text) == choice


@pytest.mark.parametrize("text", ["mean", "", "1.5", "-", "--2", "²"])
def test_another_choice_is_refused_with_those_that_there_are(text: str) -> None:
    with pytest.raises(InvalidRequest, match="last-prompt, mean-generated, last-message or a position"):
        row_choice_from(text)


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
