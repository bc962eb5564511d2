"""Marks in the loops of chat templates: the messages of the common shapes are found, and nothing false is."""

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from steer_service.core.errors import InvalidRequest
from steer_service.core.prompt import ChatMessage
from steer_service.runtime.chat_marks import ends_by_marks, with_marks

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
MERGES_INTO_LAST = (
    "{% set system = messages[0].content %}{% for m in messages[1:] %}[{{ m.role }}] "
    "{% if loop.last %}{{ system }}\n{% endif %}{{ m.content }}</s>{% endfor %}"
)
SHOWS_EVERY_KEY = (
    "{% for m in messages %}{% for key, value in m.items() %}{{ key }}={{ value }} {% endfor %}\n{% endfor %}"
)
NOT_A_LOOP = "{% raw %}{% for m in messages %}{% endraw %}{{ messages[0].content }}{{ messages[1].content }}"


def rendered(template: str, messages: Sequence[Mapping[str, str]], **options: bool) -> str:
    """With the environment of transformers."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template).render(messages=messages, **options)


def _refuse(message: str) -> None:
    raise InvalidRequest(message)


def conversation(*turns: tuple[str, str]) -> list[ChatMessage]:
    return [ChatMessage(role=role, content=content) for role, content in turns]


def sections(template: str, messages: Sequence[ChatMessage]) -> list[str] | None:
    plain = [{"role": one.role, "content": one.content} for one in messages]
    text = rendered(template, plain, add_generation_prompt=True)
    ends = ends_by_marks(messages, lambda marked: rendered(with_marks(template), marked), text)
    return None if ends is None else [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]


TURNS = conversation(("system", " Be brief"), ("user", "One?"), ("assistant", "<think>hm</think>Yes"), ("user", "So?"))


def test_a_template_that_writes_the_system_message_before_its_loop() -> None:
    assert sections(LLAMA_3, TURNS) == [
        "<s><|system|>Be brief<|eot|>",
        "<|user|>One?<|eot|>",
        "<|assistant|><think>hm</think>Yes<|eot|>",
        "<|user|>So?<|eot|>",
    ]


def test_a_template_that_looks_through_the_messages_before_it_writes() -> None:
    assert sections(QWEN_3, TURNS) == [
        "<|im_start|>system\n Be brief<|im_end|>\n",
        "<|im_start|>user\nOne?<|im_end|>\n",
        "<|im_start|>assistant\nYes<|im_end|>\n",
        "<|im_start|>user\nSo?<|im_end|>\n",
    ]


def test_whitespace_control_is_kept() -> None:
    assert sections(PLAIN_WHITESPACE, TURNS[1:]) == ["[Q] One?\n", "[A] <think>hm</think>Yes\n", "[Q] So?\n"]
    assert sections(VALIDATES_FIRST, TURNS[1:]) == [
        "[user] One?</s>",
        "[assistant] <think>hm</think>Yes</s>",
        "[user] So?</s>",
    ]


@pytest.mark.parametrize("template", [INDEXES, MERGES_INTO_LAST, SHOWS_EVERY_KEY, NOT_A_LOOP])
def test_nothing_is_concluded_from_other_shapes(template: str) -> None:
    assert sections(template, TURNS) is None


def test_a_refused_conversation_proves_nothing() -> None:
    def refuse(_: object) -> str:
        raise InvalidRequest("no")

    assert ends_by_marks(TURNS, refuse, "text") is None


def test_a_text_that_is_not_the_rendering_proves_nothing() -> None:
    assert ends_by_marks(TURNS, lambda marked: rendered(with_marks(LLAMA_3), marked), "something else") is None


CONTENTS = st.text(st.sampled_from("ab \n<>:=;{}%0"), max_size=8) | st.sampled_from(["</think>", "{% for m in x %}"])


@given(
    st.sampled_from([LLAMA_3, QWEN_3, PLAIN_WHITESPACE, VALIDATES_FIRST]),
    st.lists(st.tuples(st.sampled_from(["user", "assistant"]), CONTENTS), min_size=1, max_size=6),
)
def test_every_message_is_in_its_own_section(template: str, turns: list[tuple[str, str]]) -> None:
    found = sections(template, conversation(*turns))

    assert found is not None
    for (_, content), section in zip(turns, found, strict=True):
        assert content.split("</think>")[-1].strip() in section
