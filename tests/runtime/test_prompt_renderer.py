"""Prompts of the bundled model: long conversations take linear work, and prompts too long are refused early."""

import asyncio
import threading
from dataclasses import replace
from typing import Any

import pytest
from transformers import AutoTokenizer

from steer_service.core.capture import CaptureSpec
from steer_service.core.errors import InvalidRequest
from steer_service.core.prompt import ChatMessage, ChatPrompt, Prompt, TextPrompt
from steer_service.core.request import GenerateRequest
from steer_service.hf.bundled_model import ensure_bundled_model
from steer_service.runtime.prompt_renderer import PromptRenderer
from steer_service.runtime.prompts import RenderedPrompt
from steer_service.testing.fake_backend import FAKE_MODEL

INFO = replace(FAKE_MODEL, max_model_len=8192, max_prompt_tokens=0)
LONG = replace(FAKE_MODEL, max_model_len=1 << 20, max_prompt_tokens=0)
MIB = 1 << 20


class Counting:
    """A tokenizer that counts what it renders and tokenises."""

    def __init__(self, tokenizer: Any) -> None:
        self.rendered_messages = self.tokenised_characters = 0
        self.threads: set[str] = set()
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str, **options: Any) -> Any:
        self.tokenised_characters += len(text)
        self.threads.add(threading.current_thread().name)
        return self._tokenizer(text, **options)

    def encode(self, text: str, **options: Any) -> Any:
        return self(text, **options)["input_ids"]

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        self.rendered_messages += len(messages)
        return self._tokenizer.apply_chat_template(messages, **options)


@pytest.fixture(scope="module")
def bundled() -> Any:
    return AutoTokenizer.from_pretrained(ensure_bundled_model())


@pytest.fixture
def tokenizer(bundled: Any) -> Counting:
    return Counting(bundled)


async def rendered(tokenizer: Counting, prompt: Prompt, info: Any = INFO) -> RenderedPrompt:
    request = GenerateRequest(prompt=prompt, capture=CaptureSpec(layers=(0,)))
    return await PromptRenderer(tokenizer, info).render(request)


def turns(count: int, content: str) -> ChatPrompt:
    roles = ("user", "assistant")
    return ChatPrompt(messages=[ChatMessage(role=roles[index % 2], content=content) for index in range(count)])


async def test_the_boundaries_of_a_long_conversation_take_linear_work(tokenizer: Counting) -> None:
    prompt = await rendered(tokenizer, turns(4096, "hi"), LONG)

    assert tokenizer.rendered_messages == 2 * 4096
    assert len(prompt.message_boundaries) == 4096
    for boundary, nearest in zip(prompt.message_boundaries[1:], prompt.message_boundaries, strict=False):
        between = tokenizer.decode(prompt.token_ids[nearest.end_token : boundary.start_token])
        assert between == f"<|im_end|>\n<|im_start|>{boundary.role}\n"
        assert tokenizer.decode(prompt.token_ids[boundary.start_token : boundary.end_token]) == "hi"


async def test_a_conversation_that_is_too_long_is_refused_before_its_boundaries_are_looked_for(
    tokenizer: Counting,
) -> None:
    with pytest.raises(InvalidRequest, match=r"limit of 8192") as raised:
        await rendered(tokenizer, turns(4096, "hi"))

    assert raised.value.reason == "PROMPT_TOO_LONG"
    assert tokenizer.rendered_messages == 4096


@pytest.mark.parametrize(
    "prompt",
    [
        TextPrompt(text="The sea is wide and " * (16 * MIB // 20)),
        TextPrompt(text="a" * 16 * MIB),
        TextPrompt(text=" " * 16 * MIB),
        TextPrompt(text="視" * (16 * MIB // 3)),
        turns(4096, "x" * 4096),
        turns(1, "x" * 16 * MIB),
    ],
    ids=["words", "letters", "spaces", "characters of three bytes", "many messages", "one message"],
)
async def test_sixteen_mebibytes_are_refused_before_they_are_tokenised(tokenizer: Counting, prompt: Prompt) -> None:
    with pytest.raises(InvalidRequest, match="has more tokens than the model's limit of 8192"):
        await rendered(tokenizer, prompt)

    assert tokenizer.tokenised_characters == 0


async def test_long_prompts_are_rendered_in_threads_of_their_own(tokenizer: Counting) -> None:
    await rendered(tokenizer, TextPrompt(text="Hi"))
    assert tokenizer.threads == {threading.current_thread().name}

    await asyncio.gather(*[rendered(tokenizer, TextPrompt(text="a b " * 2000)) for _ in range(3)])
    assert tokenizer.threads == {threading.current_thread().name, "steerllm-prompts"}
