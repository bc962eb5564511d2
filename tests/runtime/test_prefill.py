"""Responses that are continued: the prompt ends with exactly what was sent, or a typed error says why not."""

import pytest

from steer_service.core.errors import InvalidRequest
from steer_service.core.prompt import ChatMessage, ChatPrompt
from steer_service.runtime.prompts import RenderedPrompt, render_prompt
from tests.runtime.chat_templates import CHATML, GEMMA_2, LLAMA_3, QWEN_3, R1, TWICE, tokenizer_with

PREFILLS = ["Sure, ", "OK!\n", " ", "", "  Sure", "Hi", "a\n\n", "\n"]
TEMPLATES = {"chatml": CHATML, "gemma": GEMMA_2, "llama": LLAMA_3, "qwen": QWEN_3, "r1": R1}


def continued(prefill: str, question: str = "Hi") -> ChatPrompt:
    messages = [ChatMessage(role="user", content=question), ChatMessage(role="assistant", content=prefill)]
    return ChatPrompt(messages=messages, continue_final_message=True)


def rendered(template: str, prompt: ChatPrompt, *, with_boundaries: bool = False) -> tuple[RenderedPrompt, str]:
    tokenizer = tokenizer_with(template)
    result = render_prompt(prompt, tokenizer, with_boundaries=with_boundaries)
    return result, tokenizer.decode(result.token_ids)


@pytest.mark.parametrize("prefill", PREFILLS, ids=repr)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prompt_ends_with_exactly_what_was_sent(template: str, prefill: str) -> None:
    _, empty = rendered(TEMPLATES[template], continued(""))
    _, text = rendered(TEMPLATES[template], continued(prefill))

    assert text == empty + prefill
    assert not empty.endswith("<|im_end|>")


@pytest.mark.parametrize("prefill", PREFILLS, ids=repr)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_response_that_is_continued_has_its_place(template: str, prefill: str) -> None:
    result, text = rendered(TEMPLATES[template], continued(prefill), with_boundaries=True)

    question, answer = result.message_boundaries
    decode = tokenizer_with(None).decode
    assert decode(result.token_ids[answer.start_token : answer.end_token]) == prefill
    assert decode(result.token_ids[question.start_token : question.end_token]) == "Hi"
    if prefill:
        assert answer.end_token == len(result.token_ids)
    assert text.endswith(prefill)
    assert answer.content == prefill


def test_equal_responses_have_places_of_their_own() -> None:
    messages = [*continued("Yes").messages, *continued("Yes").messages]
    prompt = ChatPrompt(messages=[*messages[:1], messages[1], messages[2], messages[1]], continue_final_message=True)

    result, _ = rendered(QWEN_3, prompt, with_boundaries=True)

    decode = tokenizer_with(None).decode
    sections = [decode(result.token_ids[one.start_token : one.end_token]) for one in result.message_boundaries]
    assert sections == ["Hi", "Yes", "Hi", "Yes"]
    assert [one.end_token for one in result.message_boundaries][-1] == len(result.token_ids)


@pytest.mark.parametrize(
    ("template", "prefill", "how", "written"),
    [
        (
            QWEN_3,
            "<think>\nI",
            "writes <think> before it",
            "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n<think>\n…<|im_end|>\n",
        ),
        (QWEN_3, "</think>", "removes", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n<|im_end|>\n"),
        (
            QWEN_3,
            "I see.</think>So",
            "removes",
            "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n…<|im_end|>\n",
        ),
        (R1, "</think>", "removes", "<|im_start|>assistant\n<|im_end|>"),
        (R1, "<think>\nHm\n</think>\nSo", "removes", "<|im_start|>assistant\n\n…<|im_end|>"),
        (TWICE, "Hi", "repeats", ")\nassistant: … (…)\n"),
    ],
)
@pytest.mark.parametrize("question", ["Hi", "think", "<think>"])
def test_a_beginning_that_the_template_alters_is_refused(
    template: str, prefill: str, how: str, written: str, question: str
) -> None:
    """With what the template writes in its place, where an ellipsis stands for the caller's own words."""
    with pytest.raises(InvalidRequest, match=how) as refused:
        rendered(template, continued(prefill, question))
    assert (refused.value.reason, refused.value.field) == ("PREFILL_ALTERED", "prompt.messages")
    assert f"as in {written!r};" in refused.value.message


def test_only_the_end_of_what_the_template_writes_is_quoted() -> None:
    template = "{% for m in messages %}{{ '-' * 1000 + m.content + m.content }}{% endfor %}"

    with pytest.raises(InvalidRequest) as refused:
        rendered(template, continued("secret words"))

    assert "as in '…---" in refused.value.message
    assert "---……';" in refused.value.message
    assert len(refused.value.message) < 500


@pytest.mark.parametrize("question", ["Hi", "<think>"])
def test_reasoning_may_be_begun_where_the_template_does_not(question: str) -> None:
    for template in (R1, CHATML):
        assert rendered(template, continued("<think>\nI", question))[1].endswith("assistant\n<think>\nI")


def test_a_response_alone_may_be_continued() -> None:
    messages = [ChatMessage(role="assistant", content="<b> ")]
    assert rendered(R1, ChatPrompt(messages=messages, continue_final_message=True))[1].endswith("assistant\n<b> ")
