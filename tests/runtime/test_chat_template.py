"""Chat templates: their arguments reach them, and what they refuse is said in their own words."""

from typing import Any

import pytest

from steer_service.core.errors import InvalidRequest, Unsupported
from steer_service.core.prompt import ChatMessage, ChatPrompt, ToolCall
from steer_service.runtime.chat_template import arguments_of
from steer_service.runtime.prompts import RenderedPrompt, render_prompt
from tests.runtime.chat_templates import CALLS_TOOLS, CHATML, GEMMA_2, QWEN_3, TWICE, tokenizer_with


def chat(*turns: tuple[str, str], **fields: Any) -> ChatPrompt:
    return ChatPrompt(messages=[ChatMessage(role=role, content=content) for role, content in turns], **fields)


def text_of(template: str, prompt: ChatPrompt) -> str:
    return str(tokenizer_with(template).decode(rendered(template, prompt).token_ids))


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
    text = "<|im_start|>system\nYou are helpful<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(CHATML, chat(("user", "Hi"))) == text


def test_the_header_of_the_next_turn_may_be_left_out() -> None:
    prompt = chat(("user", "Hi"), ("assistant", "Hello"), add_generation_prompt=False)
    assert text_of(QWEN_3, prompt).endswith("Hello<|im_end|>\n")


def test_arguments_reach_the_template() -> None:
    thinks, does_not = (
        text_of(QWEN_3, chat(("user", "Hi"), chat_template_kwargs={"enable_thinking": flag})) for flag in (True, False)
    )
    assert thinks.endswith("<|im_start|>assistant\n")
    assert does_not == thinks + "<think>\n\n</think>\n\n"


@pytest.mark.parametrize("key", ["enable_thinkin", "content", "assistant", "for", "last", "raise_exception"])
def test_an_argument_that_the_template_does_not_use_is_refused_by_name(key: str) -> None:
    """Also if it is a word of the template."""
    with pytest.raises(InvalidRequest, match=f"does not use '{key}'") as refused:
        rendered(QWEN_3, chat(("user", "Hi"), chat_template_kwargs={key: False}))
    assert (refused.value.reason, refused.value.field) == ("UNKNOWN_TEMPLATE_KEY", "prompt.chat_template_kwargs")


@pytest.mark.parametrize(
    "template",
    [
        "{% if a is defined and not a %}{% endif %}",
        "{% if not a is defined %}{% set a = 'July' %}{% endif %}{{ a }}",
        "{% set a = a | default(true) %}",
        "{% macro f(x) %}{{ x.a }}{{ a }}{% endmacro %}{{ f(messages) }}",
        "{% for m in messages %}{% set n = m.b %}{% if a %}{% break %}{% endif %}{% endfor %}",
        "{%- generation -%}{{ a }}{%- endgeneration %}{% generation %}{% endgeneration %}",
        "{% set n = namespace(c=1) %}{% for m in messages %}{% set n.c = a or raise_exception('d') %}{% endfor %}",
    ],
)
def test_the_arguments_of_a_template_are_found(template: str) -> None:
    assert arguments_of(template) - {"messages"} == {"a"}


def test_a_template_that_jinja_alone_does_not_parse_has_every_word_as_an_argument() -> None:
    assert {"a", "section"} <= arguments_of("{% section %}{{ a }}{% endsection %}")


TOOL = {"type": "function", "function": {"name": "weather"}}


def test_tools_reach_the_template() -> None:
    text = text_of(QWEN_3, chat(("user", "Hi"), tools=[TOOL]))
    assert text.startswith('<|im_start|>tools\n{"type": "function", "function": {"name": "weather"}}\n<|im_end|>\n')


def test_tools_that_the_template_ignores_are_refused() -> None:
    with pytest.raises(Unsupported, match="ignores tools") as refused:
        rendered(CHATML, chat(("user", "Hi"), tools=[TOOL]))
    assert (refused.value.reason, refused.value.field) == ("NO_TOOLS", "prompt.tools")


def test_a_template_of_its_own_for_tools_is_used_with_tools_only() -> None:
    tokenizer = tokenizer_with(None)
    tokenizer.chat_template = {"default": CHATML, "tool_use": QWEN_3}
    for tools, has_default in (((), True), ((TOOL,), False)):
        prompt = render_prompt(chat(("user", "Hi"), tools=tools), tokenizer, with_boundaries=False)
        assert ("You are helpful" in tokenizer.decode(prompt.token_ids)) == has_default


def test_messages_have_their_places_with_tools_and_arguments() -> None:
    prompt = chat(("user", "Hi"), chat_template_kwargs={"enable_thinking": False}, tools=[TOOL])
    found = render_prompt(prompt, tokenizer_with(QWEN_3), with_boundaries=True)
    [boundary] = found.message_boundaries
    text = tokenizer_with(QWEN_3).decode(found.token_ids[boundary.start_token : boundary.end_token])
    assert text == "Hi"


CALLING = ChatPrompt(
    messages=[
        ChatMessage(role="user", content="Weather?", name="Ann"),
        ChatMessage(
            role="assistant",
            tool_calls=[ToolCall(id="c1", name="weather", arguments={"city": "Paris"})],
            reasoning_content="I look.",
        ),
        ChatMessage(role="tool", content="Sun", tool_call_id="c1"),
    ]
)


def test_fields_of_messages_reach_the_template() -> None:
    assert text_of(CALLS_TOOLS, CALLING) == (
        "<|im_start|>Ann\nWeather?<|im_end|>\n"
        "<|im_start|>assistant\n<think>I look.</think>c1 weather city=Paris<|im_end|>\n"
        "<|im_start|>tool\nSun for c1<|im_end|>\n"
    )


def test_a_template_that_takes_only_texts_gets_an_empty_one_for_none() -> None:
    assert "<|im_start|>assistant\n<|im_end|>\n<|im_start|>tool\nSun<|im_end|>\n" in text_of(CHATML, CALLING)


def test_messages_with_calls_have_their_places() -> None:
    found = render_prompt(CALLING, tokenizer_with(CALLS_TOOLS), with_boundaries=True)
    ids, boundaries = found.token_ids, found.message_boundaries
    sections = [tokenizer_with(CALLS_TOOLS).decode(ids[one.start_token : one.end_token]) for one in boundaries]
    assert sections == ["Weather?", "I look.</think>c1 weather city=Paris", "Sun"]


def test_a_default_system_prompt_of_the_template_belongs_to_no_message() -> None:
    found = render_prompt(chat(("user", "Hi")), tokenizer_with(CHATML), with_boundaries=True)
    [boundary] = found.message_boundaries
    decode = tokenizer_with(CHATML).decode
    assert decode(found.token_ids[: boundary.start_token]).startswith("<|im_start|>system\nYou are helpful<|im_end|>")
    assert decode(found.token_ids[boundary.start_token : boundary.end_token]) == "Hi"
    assert found.boundaries_missing_reason == ""


def test_a_template_whose_messages_have_no_places_says_why() -> None:
    found = render_prompt(chat(("user", "Hi")), tokenizer_with(TWICE), with_boundaries=True)
    assert found.message_boundaries == ()
    assert found.boundaries_missing_reason == (
        "the model's chat template repeats the text of message 0, so the positions of the messages are unknown"
    )
    unasked = render_prompt(chat(("user", "Hi")), tokenizer_with(TWICE), with_boundaries=False)
    assert unasked.boundaries_missing_reason == ""
