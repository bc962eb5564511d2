"""Chats with Mistral's own tokenizer, which has no chat template; vLLM uses it with `--tokenizer-mode mistral`."""

import shutil
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from vllm.tokenizers.mistral import MistralTokenizer

from steer_service.core.errors import InvalidRequest, Unsupported
from steer_service.core.prompt import ChatMessage, ChatPrompt, TextPrompt
from steer_service.runtime.prompts import render_prompt
from steer_service.runtime.token_texts import TokenizerTexts

USER = ChatMessage(role="user", content="Hi")
DATA = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("mistral")
    shutil.copy(DATA, folder / "tokenizer.model.v3")
    return MistralTokenizer.from_pretrained(str(folder))


def tokens(tokenizer: Any, *messages: ChatMessage, **fields: Any) -> list[int]:
    prompt = ChatPrompt(messages=messages, **fields)
    return list(render_prompt(prompt, tokenizer, with_boundaries=True).token_ids)


def test_a_chat_is_served_without_places_of_its_messages(tokenizer: Any) -> None:
    rendered = render_prompt(ChatPrompt(messages=[USER]), tokenizer, with_boundaries=True)

    assert list(rendered.token_ids) == tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert rendered.message_boundaries == ()
    assert rendered.boundaries_missing_reason.startswith("the model's tokenizer writes chats itself")
    assert TokenizerTexts(tokenizer).decode(rendered.token_ids, skip_special=True) == "Hi"


def test_a_response_is_continued_as_it_was_sent_or_refused(tokenizer: Any) -> None:
    sure = ChatMessage(role="assistant", content="Sure,")
    assert tokenizer.decode(tokens(tokenizer, USER, sure, continue_final_message=True)).endswith("Sure,")

    with pytest.raises(InvalidRequest) as refused:
        tokens(tokenizer, USER, ChatMessage(role="assistant", content="Sure, "), continue_final_message=True)
    assert refused.value.reason == "PREFILL_ALTERED"


def test_tools_reach_the_model(tokenizer: Any) -> None:
    tool = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {"type": "object"}}}
    assert "weather" in tokenizer.decode(tokens(tokenizer, USER, tools=[tool]))


def test_a_chat_that_it_refuses_is_a_typed_error(tokenizer: Any) -> None:
    with pytest.raises(InvalidRequest, match="refuses the conversation") as refused:
        tokens(tokenizer, USER, ChatMessage(role="assistant", content="Hello"))
    assert refused.value.reason == "TEMPLATE_REFUSED"


def test_there_is_no_template_that_takes_arguments(tokenizer: Any) -> None:
    with pytest.raises(Unsupported, match="without a template") as refused:
        tokens(tokenizer, USER, chat_template_kwargs={"enable_thinking": False})
    assert refused.value.field == "prompt.chat_template_kwargs"


def test_texts_have_its_special_tokens_unless_they_are_not_wanted(tokenizer: Any) -> None:
    with_bos, without = (
        render_prompt(TextPrompt(text="Hi", add_special_tokens=flag), tokenizer, with_boundaries=False).token_ids
        for flag in (True, False)
    )
    assert with_bos == (tokenizer.bos_token_id, *without)
