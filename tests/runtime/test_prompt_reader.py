"""Prompts shown as the model gets them: the ids of a request, and where tokens are in the text."""

import asyncio
import threading
from dataclasses import replace
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from steer_service.core.capture import CaptureSpec
from steer_service.core.errors import InvalidRequest, NotFound, SteerError
from steer_service.core.prompt import ChatMessage, ChatPrompt, Prompt, TextPrompt, TokenPrompt
from steer_service.core.prompt_tokens import DetokenizeRequest, PromptTokens, RenderRequest
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.runtime.prompt_reader import PromptReader
from steer_service.runtime.prompt_renderer import PromptRenderer
from steer_service.testing.fake_backend import FAKE_MODEL
from tests.runtime.chat_templates import CHATML, GEMMA_2, tokenizer_with

INFO = replace(FAKE_MODEL, vocab_size=300, max_model_len=256)
CHAT = ChatPrompt(messages=[ChatMessage(role="user", content="Hé 𠜎"), ChatMessage(role="assistant", content="A")])


def tokenizer_with_bos() -> PreTrainedTokenizerFast:
    tokenizer = tokenizer_with(CHATML)
    begin = ("<|begin|>", tokenizer.convert_tokens_to_ids("<|begin|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|begin|> $A", special_tokens=[begin])
    return tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer_with_bos()


async def shown(tokenizer: Any, prompt: Prompt, **options: Any) -> PromptTokens:
    return await PromptReader(tokenizer, INFO).tokens_of(RenderRequest(prompt=prompt, **options))


@pytest.mark.parametrize(
    "prompt",
    [
        TextPrompt(text="Hé 𠜎"),
        TextPrompt(text="Hé", add_special_tokens=False),
        TokenPrompt(token_ids=(4, 2, 257)),
        CHAT,
        replace(CHAT, continue_final_message=True),
        replace(CHAT, add_generation_prompt=False),
    ],
)
async def test_the_ids_are_those_of_a_request(tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> None:
    wanted = await PromptRenderer(tokenizer, INFO).render(GenerateRequest(prompt=prompt))

    for flag in (True, False):
        assert (await shown(tokenizer, prompt, with_offsets=flag)).token_ids == wanted.token_ids


@pytest.mark.parametrize("keep", [3, -1])
@pytest.mark.parametrize("prompt", [TextPrompt(text="Hé 𠜎"), TokenPrompt(token_ids=(4, 2, 257, 7)), CHAT])
async def test_a_cut_prompt_is_shown_as_a_request_has_it(
    tokenizer: PreTrainedTokenizerFast, prompt: Prompt, keep: int
) -> None:
    request = GenerateRequest(
        prompt=prompt,
        truncate_prompt_tokens=keep,
        sampling=SamplingOptions(max_tokens=0),
        capture=CaptureSpec(layers=(0,)),
    )
    wanted = await PromptRenderer(tokenizer, INFO).render(request)

    cut = await shown(tokenizer, prompt, truncate_prompt_tokens=keep)

    assert cut.token_ids == wanted.token_ids
    assert cut.message_boundaries == wanted.message_boundaries
    assert (cut.text, cut.offsets) == (tokenizer.decode(wanted.token_ids), None)
    assert (len(cut.token_ids) == 3) is (keep == 3)


@pytest.mark.parametrize(
    ("keep", "prefill"), [(None, "Hé, I"), (30, "Hé, I"), (6, "Hé, I"), (5, "é, I"), (4, ", I"), (1, "I")]
)
async def test_the_beginning_of_a_response_is_what_is_left_of_it(
    tokenizer: PreTrainedTokenizerFast, keep: int | None, prefill: str
) -> None:
    """The letter with an accent has two tokens, and the text is then one of a broken character."""
    answer = ChatMessage(role="assistant", content="Hé, I")
    prompt = ChatPrompt(messages=[CHAT.messages[0], answer], continue_final_message=True)

    cut = await shown(tokenizer, prompt, truncate_prompt_tokens=keep)

    assert cut.prefill == prefill
    assert cut.text.endswith(prefill)


async def test_a_prompt_that_is_not_cut_far_enough_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InvalidRequest) as raised:
        await shown(tokenizer, TextPrompt(text="a"), truncate_prompt_tokens=INFO.max_model_len + 1)

    assert (raised.value.reason, raised.value.field) == ("OUT_OF_RANGE", "truncate_prompt_tokens")


async def test_places_count_characters_and_tokens_of_one_character_share_its_place(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokens = await shown(tokenizer, TextPrompt(text="Hé 𠜎!"))

    assert tokens.offsets is not None
    assert tokens.text == "Hé 𠜎!"
    assert [tokens.text[start:end] for start, end in tokens.offsets] == ["", "H", "é", "é", " ", *["𠜎"] * 4, "!"]
    assert tokens.token_texts == ("<|begin|>", "H", "\ufffd", "\ufffd", " ", *["\ufffd"] * 4, "!")
    assert tokens.special_positions == (0,)
    assert tokens.offsets[0] == (0, 0)


async def test_texts_and_places_come_only_if_they_are_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = await shown(tokenizer, TextPrompt(text="Hi"), with_token_texts=False, with_offsets=False)

    assert (tokens.token_texts, tokens.offsets) == (None, None)


async def test_a_chat_is_shown_with_its_messages_its_special_tokens_and_the_beginning_of_the_response(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokens = await shown(tokenizer, replace(CHAT, continue_final_message=True))

    assert tokens.text.endswith("<|im_start|>user\nHé 𠜎<|im_end|>\n<|im_start|>assistant\nA")
    assert tokens.prefill == "A"
    assert [boundary.content for boundary in tokens.message_boundaries] == ["Hé 𠜎", "A"]
    assert tokens.message_boundaries[-1].end_token == len(tokens.token_ids)
    assert tokens.token_texts is not None
    specials = {tokens.token_texts[position] for position in tokens.special_positions}
    assert specials == {"<|im_start|>", "<|im_end|>"}
    assert (await shown(tokenizer, CHAT)).prefill == ""


async def test_token_ids_are_shown_as_their_text_without_places(tokenizer: PreTrainedTokenizerFast) -> None:
    begin = tokenizer.convert_tokens_to_ids("<|begin|>")
    tokens = await shown(tokenizer, TokenPrompt(token_ids=(begin, *tokenizer.encode("Hi", add_special_tokens=False))))

    assert (tokens.text, tokens.offsets, tokens.special_positions) == ("<|begin|>Hi", None, (0,))


async def test_a_slow_tokenizer_has_no_places() -> None:
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = CHATML
    tokens = await shown(tokenizer, TextPrompt(text="Hi"))

    assert tokens.token_ids == tuple(tokenizer.encode("Hi"))
    assert (tokens.text, tokens.offsets, tokens.token_texts) == ("Hi", None, ("H", "i", "</s>"))
    assert (await shown(tokenizer, CHAT)).message_boundaries == ()


@pytest.mark.parametrize(
    ("request_", "kind", "field", "reason"),
    [
        (RenderRequest(prompt=TextPrompt(text="a" * 300)), InvalidRequest, "prompt", "PROMPT_TOO_LONG"),
        (RenderRequest(prompt=TokenPrompt(token_ids=(1,) * 300)), InvalidRequest, "prompt", "PROMPT_TOO_LONG"),
        (RenderRequest(prompt=TokenPrompt(token_ids=(300,))), InvalidRequest, "prompt.token_ids", "BAD_TOKEN"),
        (RenderRequest(prompt=TextPrompt(text="a"), model="other"), NotFound, "model", "UNKNOWN_MODEL"),
        (
            RenderRequest(prompt=ChatPrompt(messages=[ChatMessage(role="system", content="a")])),
            InvalidRequest,
            "prompt.messages",
            "TEMPLATE_REFUSED",
        ),
    ],
)
async def test_what_a_request_may_not_have_is_refused_here_too(
    request_: RenderRequest, kind: type[SteerError], field: str, reason: str
) -> None:
    with pytest.raises(kind) as raised:
        await PromptReader(tokenizer_with(GEMMA_2), INFO).tokens_of(request_)
    assert (raised.value.field, raised.value.reason) == (field, reason)


async def test_nothing_is_tokenised_in_the_event_loop(tokenizer: PreTrainedTokenizerFast) -> None:
    threads = set()

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, *arguments: Any, **options: Any) -> Any:
            threads.add(threading.current_thread())
            return tokenizer(*arguments, **options)

    await shown(Watched(), TextPrompt(text="Hi"))
    assert threads
    assert threading.current_thread() not in threads


async def test_one_slow_text_does_not_hold_up_another(tokenizer: PreTrainedTokenizerFast) -> None:
    begun, let_go = threading.Event(), threading.Event()

    class Slow:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, text: str, **options: Any) -> Any:
            if text == "slow":
                begun.set()
                assert let_go.wait(60)
            return tokenizer(text, **options)

    reader = PromptReader(Slow(), INFO)
    slow = asyncio.ensure_future(reader.tokens_of(RenderRequest(prompt=TextPrompt(text="slow"))))
    assert await asyncio.to_thread(begun.wait, 60)
    quick = reader.tokens_of(RenderRequest(prompt=TextPrompt(text="quick")))
    assert (await asyncio.wait_for(quick, 60)).text == "quick"
    let_go.set()
    assert (await slow).text == "slow"


async def test_tokens_become_text_with_or_without_special_ones(tokenizer: PreTrainedTokenizerFast) -> None:
    reader, token_ids = PromptReader(tokenizer, INFO), tokenizer.encode("Hé 𠜎")

    assert await reader.text_of(DetokenizeRequest(token_ids=token_ids)) == "<|begin|>Hé 𠜎"
    assert await reader.text_of(DetokenizeRequest(token_ids=token_ids, skip_special_tokens=True)) == "Hé 𠜎"
    assert await reader.text_of(DetokenizeRequest(token_ids=())) == ""
    assert await reader.text_of(DetokenizeRequest(token_ids=token_ids[:3])) == "<|begin|>H\ufffd"


async def test_ids_that_only_the_model_has_leave_no_trace_in_the_text() -> None:
    tokenizer = tokenizer_with_bos()
    reader = PromptReader(tokenizer, replace(INFO, vocab_size=10_000))
    token_ids = [*tokenizer.encode("Hi", add_special_tokens=False), 9_999]

    assert await reader.text_of(DetokenizeRequest(token_ids=token_ids)) == "Hi"
    shown = await reader.tokens_of(RenderRequest(prompt=TokenPrompt(token_ids=token_ids)))
    assert (shown.text, shown.token_texts) == ("Hi", ("H", "i", ""))


@pytest.mark.parametrize(
    ("token_ids", "reason"), [((300,), "BAD_TOKEN"), ((1,) * 257, "TOO_MANY_ENTRIES")], ids=["unknown", "too many"]
)
async def test_tokens_that_the_model_cannot_have_are_refused(token_ids: tuple[int, ...], reason: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        await PromptReader(tokenizer_with_bos(), INFO).text_of(DetokenizeRequest(token_ids=token_ids))
    assert (raised.value.field, raised.value.reason) == ("token_ids", reason)
