"""The template and the arguments that an operator chooses for all chats."""

from pathlib import Path
from typing import Any

import pytest

from steer_service.core.capture import CaptureSpec
from steer_service.core.errors import InvalidRequest, Unsupported
from steer_service.core.prompt import ChatMessage, ChatPrompt
from steer_service.core.request import GenerateRequest
from steer_service.runtime.chat_defaults import ChatDefaults
from steer_service.runtime.prompt_renderer import PromptRenderer
from steer_service.testing.fake_backend import FAKE_MODEL
from tests.runtime.chat_templates import CHATML, QWEN_3, tokenizer_with

THINKS_NOT = "<|im_start|>assistant\n<think>\n\n</think>\n\n"


async def text_of(defaults: ChatDefaults, template: str | None = CHATML, **fields: Any) -> str:
    tokenizer = tokenizer_with(template)
    prompt = ChatPrompt(messages=[ChatMessage(role="user", content="Hi")], **fields)
    request = GenerateRequest(prompt=prompt, capture=CaptureSpec(layers=(0,)))
    rendered = await PromptRenderer(tokenizer, FAKE_MODEL, defaults).render(request)
    assert len(rendered.message_boundaries) == 1
    return tokenizer.decode(rendered.token_ids)


@pytest.mark.parametrize("own", [CHATML, None])
@pytest.mark.parametrize("is_file", [True, False])
async def test_a_template_stands_in_for_the_tokenizer_s_own(tmp_path: Path, own: str | None, is_file: bool) -> None:
    (tmp_path / "qwen.jinja").write_text(QWEN_3, encoding="utf-8")

    defaults = ChatDefaults.of(str(tmp_path / "qwen.jinja") if is_file else QWEN_3, None)

    assert await text_of(defaults, own) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("kwargs", [{"enable_thinking": False}, '{"enable_thinking": false}'])
async def test_arguments_hold_where_a_chat_does_not_give_them(kwargs: Any) -> None:
    defaults = ChatDefaults.of(None, kwargs)

    assert (await text_of(defaults, QWEN_3)).endswith(THINKS_NOT)
    own = await text_of(defaults, QWEN_3, chat_template_kwargs={"enable_thinking": True})
    assert own.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    "kwargs", ["{", "[]", {"tools": []}, {"a": "x" * (16 << 10)}], ids=lambda value: repr(value)[:9]
)
def test_other_arguments_than_a_chat_may_give_are_refused(kwargs: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        ChatDefaults.of(None, kwargs)
    assert refused.value.field == "default_chat_template_kwargs"


def test_what_is_neither_a_file_nor_a_template_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name in ("nowhere.jinja", str(tmp_path), str(tmp_path / "binary"), ""):
        with pytest.raises(InvalidRequest, match="neither a file") as refused:
            ChatDefaults.of(name, None)
        assert refused.value.field == "chat_template"


@pytest.mark.parametrize(
    ("defaults", "field"),
    [
        (ChatDefaults(template=CHATML), "chat_template"),
        (ChatDefaults(kwargs={"a": 1}), "default_chat_template_kwargs"),
    ],
)
def test_a_tokenizer_that_takes_no_template_refuses_them_when_it_starts(defaults: ChatDefaults, field: str) -> None:
    with pytest.raises(Unsupported, match="without a template") as refused:
        PromptRenderer(object(), FAKE_MODEL, defaults)
    assert refused.value.field == field
