"""Texts whose special tokens stand in them already."""

import logging
import warnings
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from steer_service.core.errors import InvalidRequest
from steer_service.core.prompt import Prompt, TextPrompt, TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.runtime.prompt_renderer import PromptRenderer
from steer_service.runtime.second_bos import warn_of_second_bos
from steer_service.testing.fake_backend import FAKE_MODEL
from tests.runtime.chat_templates import tokenizer_with
from tests.runtime.scripted import DONE, Scripted, finished, said, started

BOS = "<|begin|>"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Adds BOS to texts."""
    made = tokenizer_with(None)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, made.convert_tokens_to_ids(BOS))]
    )
    return made


async def tokens_of(tokenizer: Any, prompt: Prompt) -> Any:
    rendered = await PromptRenderer(tokenizer, FAKE_MODEL).render(GenerateRequest(prompt=prompt))
    return tokenizer.convert_ids_to_tokens(list(rendered.token_ids))


async def test_special_tokens_are_added_unless_they_are_not_wanted(tokenizer: PreTrainedTokenizerFast) -> None:
    assert await tokens_of(tokenizer, TextPrompt(text="Hi")) == [BOS, "H", "i"]
    assert await tokens_of(tokenizer, TextPrompt(text="Hi", add_special_tokens=False)) == ["H", "i"]
    assert await tokens_of(tokenizer, TextPrompt(text=f"{BOS}Hi", add_special_tokens=False)) == [BOS, "H", "i"]


async def test_a_server_says_once_that_a_text_has_its_bos_twice(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    renderer = PromptRenderer(tokenizer, FAKE_MODEL)

    with caplog.at_level(logging.WARNING):
        for text in ("Hi", f"{BOS}My secret", f"{BOS}Another"):
            await renderer.render(GenerateRequest(prompt=TextPrompt(text=text)))

    [record] = caplog.records
    assert "add_special_tokens" in record.getMessage()
    assert "secret" not in record.getMessage()


def test_a_caller_is_warned_of_a_second_bos() -> None:
    with pytest.warns(UserWarning, match="begins with <s>, which the tokenizer added again; add_special_tokens=False"):
        warn_of_second_bos(TextPrompt(text="<s>Hi"), (1, 1, 7))


@pytest.mark.parametrize(
    ("prompt", "token_ids"),
    [
        (TextPrompt(text="<s>Hi"), (1, 5, 7)),
        (TextPrompt(text="<s>Hi"), (1,)),
        (TextPrompt(text="haha"), (5, 5)),
        (TextPrompt(text="<<<<"), (5, 5)),
        (TextPrompt(text="<s>Hi", add_special_tokens=False), (1, 1)),
    ],
)
def test_other_callers_are_not(prompt: TextPrompt, token_ids: tuple[int, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_second_bos(prompt, token_ids)


async def test_every_call_warns() -> None:
    begun = replace(started(), prompt_token_ids=(1, 1))
    with pytest.warns(UserWarning, match="begins with <s>"):
        await Scripted([begun, said("a"), finished(), DONE]).generate("<s>Hi")


async def test_the_calls_pass_it_on() -> None:
    backend = Scripted()
    await backend.generate(["a", TextPrompt(text="b")], add_special_tokens=False)
    await backend.generate("c")
    _ = [text async for text in backend.stream("d", add_special_tokens=False)]
    assert [request.prompt.add_special_tokens for request in backend.requests] == [False, False, True, False]


@pytest.mark.parametrize("prompt", [[[1, 2]], TokenPrompt(token_ids=(1,))])
async def test_it_is_for_texts_only(prompt: Any) -> None:
    with pytest.raises(InvalidRequest, match="only the tokenizer of a text") as refused:
        await Scripted().generate(prompt, add_special_tokens=False)
    assert refused.value.field == "prompt.add_special_tokens"
