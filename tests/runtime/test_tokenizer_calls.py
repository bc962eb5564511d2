"""What `tokenize`, `detokenize` and `render` make of their arguments."""

from typing import Any

import pytest

from steer_service.core.errors import InvalidRequest
from steer_service.core.prompt import ChatMessage, ChatPrompt, Prompt, TextPrompt, TokenPrompt
from steer_service.core.prompt_tokens import DetokenizeRequest, PromptTokens, RenderRequest
from steer_service.runtime.tokenizer_calls import TokenizerCalls

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A"}]
TURNS = (ChatMessage(role="user", content="Hi"), ChatMessage(role="assistant", content="A"))


class Recording(TokenizerCalls):
    """Keeps the requests that the calls make."""

    def __init__(self) -> None:
        self.requests: list[RenderRequest | DetokenizeRequest] = []

    async def tokens_of(self, request: RenderRequest) -> PromptTokens:
        self.requests.append(request)
        return PromptTokens(text="", token_ids=())

    async def text_of(self, request: DetokenizeRequest) -> str:
        self.requests.append(request)
        return ""


@pytest.mark.parametrize(
    ("given", "options", "prompt"),
    [
        ("Hi", {}, TextPrompt(text="Hi")),
        ("Hi", {"add_special_tokens": False}, TextPrompt(text="Hi", add_special_tokens=False)),
        ([1, 2], {}, TokenPrompt(token_ids=(1, 2))),
        (TextPrompt(text="Hi"), {}, TextPrompt(text="Hi")),
        (MESSAGES, {}, ChatPrompt(messages=TURNS)),
        (list(TURNS), {"continue_final_message": True}, ChatPrompt(messages=TURNS, continue_final_message=True)),
        (
            MESSAGES,
            {"add_generation_prompt": False, "chat_template_kwargs": {"a": 1}, "tools": [{"b": 2}]},
            ChatPrompt(messages=TURNS, add_generation_prompt=False, chat_template_kwargs={"a": 1}, tools=({"b": 2},)),
        ),
    ],
)
async def test_render_takes_every_kind_of_prompt_with_its_keywords(given: Any, options: Any, prompt: Prompt) -> None:
    calls = Recording()
    await calls.render(given, model="m", **options)
    assert calls.requests == [RenderRequest(prompt=prompt, model="m")]


@pytest.mark.parametrize(
    ("given", "options", "field"),
    [
        ("Hi", {"tools": []}, "prompt.tools"),
        (MESSAGES, {"add_special_tokens": True}, "prompt.add_special_tokens"),
        ([1], {"add_special_tokens": True}, "prompt.add_special_tokens"),
        (MESSAGES, {"temperature": 1}, "prompt"),
        ([{"role": "user", "text": "Hi"}], {}, "prompt.messages[0]"),
        ("", {}, "prompt.text"),
    ],
)
async def test_options_that_do_not_fit_the_prompt_are_refused(given: Any, options: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        await Recording().render(given, **options)
    assert raised.value.field == field


async def test_tokenize_takes_a_text_and_detokenize_tokens() -> None:
    calls = Recording()
    await calls.tokenize("Hi", add_special_tokens=False, with_token_texts=False, with_offsets=False, model="m")
    await calls.detokenize([1, 2], skip_special_tokens=True, model="m")

    prompt = TextPrompt(text="Hi", add_special_tokens=False)
    assert calls.requests == [
        RenderRequest(prompt=prompt, model="m", with_token_texts=False, with_offsets=False),
        DetokenizeRequest(token_ids=(1, 2), skip_special_tokens=True, model="m"),
    ]


@pytest.mark.parametrize("token_ids", ["12", [-1], [1.5], [2**31]])
async def test_what_is_no_list_of_tokens_is_refused(token_ids: Any) -> None:
    with pytest.raises(InvalidRequest) as raised:
        await Recording().detokenize(token_ids)
    assert (raised.value.field, raised.value.reason) == ("token_ids", "BAD_TOKEN")
