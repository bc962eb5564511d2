"""Marks in the texts of conversations: the texts are found in templates of many shapes, and nothing false is."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from steer_service.core.errors import InvalidRequest, Unsupported
from steer_service.core.prompt import ChatMessage, ToolCall
from steer_service.runtime.chat_marks import spans_by_marks
from steer_service.runtime.conversations import as_dict

LLAMA_3 = """{{- '<s>' }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|system|>" + system_message + "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool') %}
        {{- '<|' + message['role'] + '|>' + message['content'] | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""
QWEN_3 = """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "user" or message.role == "system" %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.last or loop.index0 > ns.last_query_index %}
            {{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + content }}
        {%- else %}
            {{- '<|im_start|>assistant\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
PLAIN_WHITESPACE = """{% for message in messages %}
    {% if message['role'] == 'user' %}
[Q] {{ message['content'] }}
    {% else %}
[A] {{ message['content'] }}
    {% endif %}
{% endfor %}
"""
VALIDATES_FIRST = """{%- for m in messages -%}
{%- if m.role == 'tool' -%}{{ raise_exception('no tools') }}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%} [{{ m.role }}] {{ m.content }}</s>{%- endfor -%}
"""
INDEXES = "{% for i in range(messages | length) %}[{{ messages[i].role }}] {{ messages[i].content }}\n{% endfor %}"
MERGES_INTO_FIRST = (  # the shape of Llama-2's and Gemma-3's
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (messages[0].content + ' | ' if loop.index0 == 1 and messages[0].role == 'system' else '') }}"
    "{{ m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"
)
MERGES_INTO_LAST = (
    "{% set system = messages[0].content %}{% for m in messages[1:] %}[{{ m.role }}] "
    "{% if loop.last %}{{ system }}\n{% endif %}{{ m.content }}</s>{% endfor %}"
)
NEWEST_FIRST = "{% for m in messages | reverse %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
TWICE = "{% for m in messages %}[{{ m.role }}] {{ m.content }} ({{ m.content }})\n{% endfor %}"
COUNTS = "{% for m in messages %}[{{ m.role }}, {{ m.content | length }}] {{ m.content }}\n{% endfor %}"
LEAVES_OUT_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}[{{ m.role }}] {{ m.content.split('</think>')[-1] }}\n{% endfor %}"
)
ANSWERS_ONLY = "{% for m in messages if m.role == 'assistant' %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
HERMES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls %}{% if loop.first and m.content %}\n{% endif %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
)
IN_TAGS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls %}"
    "<function={{ call.function.name }}>{% for key, value in call.function.arguments.items() %}"
    "<parameter={{ key }}>\n{{ value }}\n</parameter>{% endfor %}</function>{% endfor %}<|im_end|>\n{% endfor %}"
)


def rendered(template: str, messages: Sequence[Mapping[str, Any]], **options: bool) -> str:
    """With the environment of transformers."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template).render(messages=messages, **options)


def _refuse(message: str) -> None:
    raise InvalidRequest(message)


def conversation(*turns: tuple[str, str]) -> list[ChatMessage]:
    return [ChatMessage(role=role, content=content) for role, content in turns]


def spans_of(template: str, messages: Sequence[ChatMessage]) -> tuple[str, list[tuple[int, int]]]:
    text = rendered(template, [*map(as_dict, messages)], add_generation_prompt=True)
    render = lambda marked: rendered(template, marked, add_generation_prompt=True)  # noqa: E731
    return text, spans_by_marks(messages, render, text, is_open=False)


def texts(template: str, messages: Sequence[ChatMessage]) -> list[str]:
    text, spans = spans_of(template, messages)
    return [text[first:end] for first, end in spans]


TURNS = conversation(("system", " Be brief"), ("user", "One?"), ("assistant", "<think>hm</think>Yes"), ("user", "So?"))


@pytest.mark.parametrize(
    ("template", "own"),
    [
        (LLAMA_3, ["Be brief", "One?", "<think>hm</think>Yes", "So?"]),
        (QWEN_3, [" Be brief", "One?", "Yes", "So?"]),
        (INDEXES, [" Be brief", "One?", "<think>hm</think>Yes", "So?"]),
        (PLAIN_WHITESPACE, [" Be brief", "One?", "<think>hm</think>Yes", "So?"]),
        (VALIDATES_FIRST, [" Be brief", "One?", "<think>hm</think>Yes", "So?"]),
        (MERGES_INTO_FIRST, [" Be brief", "One?", "<think>hm</think>Yes", "So?"]),
        (LEAVES_OUT_SYSTEM, ["", "One?", "Yes", "So?"]),
        (ANSWERS_ONLY, ["", "", "<think>hm</think>Yes", ""]),
    ],
)
def test_a_message_is_its_own_text_and_nothing_of_the_template(template: str, own: list[str]) -> None:
    assert texts(template, TURNS) == own


def test_texts_that_equal_those_of_the_template_stand_in_their_own_places() -> None:
    messages = conversation(("user", "user"), ("assistant", "assistant"), ("user", "\n"), ("user", "user"))
    text, spans = spans_of(INDEXES, messages)

    assert text == "[user] user\n[assistant] assistant\n[user] \n\n[user] user\n"
    assert spans == [(7, 11), (24, 33), (41, 42), (50, 54)]


@pytest.mark.parametrize("template", [LLAMA_3, QWEN_3, INDEXES])
def test_an_empty_message_has_an_empty_place(template: str) -> None:
    assert texts(template, conversation(("user", ""), ("assistant", "Yes"), ("user", ""))) == ["", "Yes", ""]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (MERGES_INTO_LAST, "does not write one message after the other"),
        (NEWEST_FIRST, "does not write one message after the other"),
        (TWICE, "repeats the text of message 0"),
        (COUNTS, "writes messages in a way that depends on their texts"),
    ],
)
def test_a_template_without_known_places_says_why(template: str, why: str) -> None:
    with pytest.raises(
        Unsupported, match=f"the model's chat template {why}, so the positions of the messages are unknown$"
    ):
        texts(template, TURNS)


def test_a_refused_conversation_proves_nothing() -> None:
    def refuse(_: object) -> str:
        raise InvalidRequest("no")

    with pytest.raises(Unsupported, match="depends on their texts"):
        spans_by_marks(TURNS, refuse, "text", is_open=False)


def test_a_text_that_is_not_the_rendering_proves_nothing() -> None:
    with pytest.raises(Unsupported, match="depends on their texts"):
        spans_by_marks(TURNS, lambda marked: rendered(LLAMA_3, marked), "something else", is_open=False)


def calling(content: str = "", reasoning: str = "", **arguments: object) -> list[ChatMessage]:
    call = ToolCall(id="c1", name="weather", arguments=arguments)
    turn = ChatMessage(role="assistant", content=content, tool_calls=[call], reasoning_content=reasoning)
    return [ChatMessage(role="user", content="Go"), turn, ChatMessage(role="tool", content="Sun", tool_call_id="c1")]


@pytest.mark.parametrize(
    ("template", "messages", "own"),
    [
        (HERMES, calling(city="Paris"), 'weather", "arguments": {"city": "Paris"}'),
        (HERMES, calling(days=3), 'weather", "arguments": {"days": 3}'),
        (HERMES, calling(), 'weather", "arguments": {}'),
        (HERMES, calling("I look.", city="Ünlü", of={"days": [1]}), 'I look.<tool_call>{"name": "weather", "argu'),
        (HERMES, calling("", "Hm", days=3), 'Hm</think><tool_call>{"name": "weather", "arguments": {"days": 3}'),
        (IN_TAGS, calling("I look.", city="Paris"), "I look.<function=weather><parameter=city>Paris"),
        (IN_TAGS, calling(city="Paris", days=3), "weather><parameter=city>Paris"),
    ],
)
def test_reasoning_and_calls_belong_to_their_message(template: str, messages: list[ChatMessage], own: str) -> None:
    found = [re.sub(r"\n", "", text) for text in texts(template, messages)]

    assert (found[0], found[2]) == ("Go", "Sun")
    assert found[1].startswith(own)
    assert found[1] == own or own.endswith("argu")


def test_the_content_of_an_open_message_keeps_its_spaces() -> None:
    messages = conversation(("user", " Hi "), ("assistant", " Sure "))
    template = "{% for m in messages[:-1] %}[{{ m.content | trim }}]{% endfor %}{{ messages[-1].content }}"

    spans = spans_by_marks(messages, lambda marked: rendered(template, marked), "[Hi] Sure ", is_open=True)

    assert spans == [(1, 3), (4, 10)]


CONTENTS = st.text(st.sampled_from("ab \n<>:=;{}%0"), max_size=8) | st.sampled_from(["</think>", "{% for m in x %}"])


@given(
    st.sampled_from([LLAMA_3, QWEN_3, PLAIN_WHITESPACE, VALIDATES_FIRST, INDEXES]),
    st.lists(st.tuples(st.sampled_from(["user", "assistant"]), CONTENTS), min_size=1, max_size=6),
)
def test_every_text_is_found_whole(template: str, turns: list[tuple[str, str]]) -> None:
    found = texts(template, conversation(*turns))

    for (role, content), own in zip(turns, found, strict=True):
        if template is QWEN_3 and role == "assistant":
            content = content.split("</think>")[-1]
        assert own == content or own.strip() in content
        assert re.sub(r"</?[^<>\s]{1,64}>|\s", "", content) == re.sub(r"</?[^<>\s]{1,64}>|\s", "", own)
