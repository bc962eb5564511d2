"""Chat templates: what they refuse is said in their own words."""

import pytest

from steer_service.core.errors import InvalidRequest, Unsupported
from steer_service.core.prompt import ChatMessage, ChatPrompt
from steer_service.runtime.prompts import RenderedPrompt, render_prompt
from tests.runtime.chat_templates import CHATML, GEMMA_2, tokenizer_with


def chat(*turns: tuple[str, str]) -> ChatPrompt:
    return ChatPrompt(messages=[ChatMessage(role=role, content=content) for role, content in turns])


def rendered(template: str | None, prompt: ChatPrompt) -> RenderedPrompt:
    return render_prompt(prompt, tokenizer_with(template), with_boundaries=False)


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        (chat(("system", "Be brief"), ("user", "Hi")), "There is no system turn"),
        (chat(("user", "Hi"), ("user", "Hello?")), "Turns must alternate"),
    ],
)
def test_the_sentence_of_a_template_that_refuses_reaches_the_caller(prompt: ChatPrompt, sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=f"refuses the conversation: {sentence}") as refused:
        rendered(GEMMA_2, prompt)
    assert (refused.value.reason, refused.value.field) == ("TEMPLATE_REFUSED", "prompt.messages")


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ messages[7].content.strip() }}", "list object has no element 7"),
        ("{{ 'a' + 5 }}", "can only concatenate str"),
        ("{% for m in %}", "Expected an expression"),
    ],
)
def test_a_template_that_is_wrong_says_what_is_wrong(template: str, sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        rendered(template, chat(("user", "Hi")))


def test_a_long_sentence_is_cut_and_stands_on_one_line() -> None:
    with pytest.raises(InvalidRequest) as refused:
        rendered("{{ raise_exception('No.\n\n' + 'long ' * 10000) }}", chat(("user", "Hi")))
    assert refused.value.message.startswith("the model's chat template refuses the conversation: No. long long ")
    assert len(refused.value.message) < 600
    assert "\n" not in refused.value.message


def test_a_model_without_a_template_has_no_chat() -> None:
    with pytest.raises(Unsupported, match="no chat template") as refused:
        rendered(None, chat(("user", "Hi")))
    assert refused.value.reason == "NO_CHAT_TEMPLATE"


def test_a_conversation_is_rendered_by_the_template() -> None:
    prompt = rendered(CHATML, chat(("user", "Hi")))
    text = "<|im_start|>system\nYou are helpful<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer_with(CHATML).decode(prompt.token_ids) == text
