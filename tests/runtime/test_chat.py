"""Message boundaries: each message owns its header and its closing tokens, whatever the template."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from steer_service.core.errors import InvalidRequest, Unsupported
from steer_service.core.prompt import ChatMessage
from steer_service.runtime.chat import MAX_PREFIXES, message_boundaries
from steer_service.runtime.chat_marks import with_marks

PREAMBLE = "<|im_start|>system\nYou are helpful<|im_end|>\n"
HEADER = "<|im_start|>assistant\n"
CHATML = (  # the shape of the templates of SmolLM2 and Qwen2: they insert a system message where there is none
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DROPS_REASONING = (  # the shape of Qwen3's: an answer before the last question is written otherwise than the last one
    "{% set last = namespace(question=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > last.question %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content.split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MERGES_SYSTEM = (  # the shape of Llama-2's: the system message stands inside the first question
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (messages[0].content if loop.index0 == 1 and messages[0].role == 'system' else '') + m.content }}"
    "{{ ' [/INST]' }}{% elif m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"
)
NEWEST_FIRST = (
    "{% for m in messages | reverse %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
)


def conversation(*turns: tuple[str, str]) -> list[ChatMessage]:
    return [ChatMessage(role=role, content=content) for role, content in turns]


@functools.cache
def renderer(template: str, *, add_generation_prompt: bool = False) -> Callable[[Sequence[ChatMessage]], str]:
    compiled = jinja2.Environment().from_string(template, globals={"add_generation_prompt": add_generation_prompt})
    return lambda messages: compiled.render(messages=[{"role": m.role, "content": m.content} for m in messages])


@functools.cache
def marked_renderer(template: str) -> Callable[[Sequence[Mapping[str, str]]], str]:
    compiled = jinja2.Environment().from_string(with_marks(template))
    return lambda messages: compiled.render(messages=messages)


def words(text: str) -> list[tuple[int, int]]:
    """Character spans of special tokens, words, and single other characters."""
    return [match.span() for match in re.finditer(r"<\|\w+\|>|\w+|\s|.", text)]


def sections(messages: Sequence[ChatMessage], template: str, full_text: str | None = None) -> list[str]:
    """The text under each message's tokens."""
    if full_text is None:
        full_text = renderer(template, add_generation_prompt=True)(messages)
    offsets = words(full_text)
    boundaries = message_boundaries(
        messages, renderer(template), full_text, offsets, render_marked=marked_renderer(template)
    )
    assert boundaries == message_boundaries(messages, renderer(template), full_text, offsets)
    return ["".join(full_text[a:b] for a, b in offsets[one.start_token : one.end_token]) for one in boundaries]


@given(
    st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(max_size=12)), min_size=1, max_size=6)
)
def test_messages_follow_each_other_and_leave_out_only_the_answer_header(turns: list[tuple[str, str]]) -> None:
    messages = conversation(*turns)

    found = sections(messages, CHATML)

    expected = [f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in messages]
    if messages[0].role != "system":
        expected[0] = PREAMBLE + expected[0]
    assert found == expected


@given(st.data())
def test_every_token_lies_in_the_message_in_which_it_starts(data: st.DataObject) -> None:
    messages = conversation(("user", "one two"), ("assistant", "three"), ("user", "four"))
    full_text = renderer(CHATML, add_generation_prompt=True)(messages)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(full_text) - 1), max_size=40)))
    offsets = list(zip([0, *cuts], [*cuts, len(full_text)], strict=True))

    boundaries = message_boundaries(messages, renderer(CHATML), full_text, offsets)

    ends = [len(renderer(CHATML)(messages[: count + 1])) for count in range(3)]
    for boundary, begin, end in zip(boundaries, [0, *ends], ends, strict=False):
        inside = [index for index, (start, _) in enumerate(offsets) if begin <= start < end]
        assert list(range(boundary.start_token, boundary.end_token)) == inside


def test_boundaries_carry_role_and_content() -> None:
    messages = conversation(("system", "Be brief"), ("user", "Hello"))
    full_text = renderer(CHATML)(messages)

    first, second = message_boundaries(messages, renderer(CHATML), full_text, words(full_text))

    assert (first.role, first.content, first.start_token) == ("system", "Be brief", 0)
    assert (second.role, second.content, second.end_token) == ("user", "Hello", len(words(full_text)))
    assert first.end_token == second.start_token


def test_a_preamble_of_the_template_belongs_to_the_first_message() -> None:
    assert sections(conversation(("user", "Hello")), CHATML) == [PREAMBLE + "<|im_start|>user\nHello<|im_end|>\n"]


def test_a_message_to_be_continued_ends_with_the_prompt() -> None:
    messages = conversation(("user", "Capital of France?"), ("assistant", "The capital"))
    full_text = renderer(CHATML)(messages).removesuffix("<|im_end|>\n")

    assert sections(messages, CHATML, full_text)[1] == "<|im_start|>assistant\nThe capital"


def test_an_answer_whose_reasoning_is_dropped_later_keeps_its_place() -> None:
    messages = conversation(
        ("user", "One?"), ("assistant", "<think>hm</think>Yes"), ("user", "Two?"), ("assistant", "No"), ("user", "So?")
    )

    assert sections(messages, DROPS_REASONING) == [
        "<|im_start|>user\nOne?<|im_end|>\n",
        "<|im_start|>assistant\nYes<|im_end|>\n",
        "<|im_start|>user\nTwo?<|im_end|>\n",
        "<|im_start|>assistant\nNo<|im_end|>\n",
        "<|im_start|>user\nSo?<|im_end|>\n",
    ]


def test_a_template_that_refuses_a_lone_system_message_still_has_places() -> None:
    plain = renderer(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    )

    def strict(messages: Sequence[ChatMessage]) -> str:
        if all(message.role == "system" for message in messages):
            raise InvalidRequest("no question found")
        return plain(messages)

    messages = conversation(("system", "Be brief"), ("user", "Hello"))
    full_text = plain(messages) + HEADER
    offsets = words(full_text)

    first, second = message_boundaries(messages, strict, full_text, offsets)

    assert offsets[first.end_token][0] == len("<|im_start|>system\nBe brief<|im_end|>\n")
    assert offsets[second.end_token][0] == len(full_text) - len(HEADER)


@pytest.mark.parametrize("template", [MERGES_SYSTEM, NEWEST_FIRST])
def test_a_template_that_mixes_messages_is_refused(template: str) -> None:
    with pytest.raises(Unsupported, match="does not write one message after the other") as raised:
        sections(conversation(("system", "Be brief"), ("user", "Hello")), template)
    assert raised.value.field == "prompt.messages"


def test_a_prompt_that_is_not_the_rendering_is_refused() -> None:
    with pytest.raises(Unsupported):
        sections(conversation(("user", "Hello")), CHATML, full_text="something else")


def test_a_token_the_tokenizer_puts_in_front_belongs_to_the_first_message() -> None:
    messages = conversation(("user", "Hello"), ("assistant", "Hi"))
    full_text = renderer(CHATML)(messages)
    offsets = [(0, 0), *words(full_text), (0, 0)]  # what tokenizers report for tokens that stand for no text

    first, second = message_boundaries(messages, renderer(CHATML), full_text, offsets)

    assert (first.start_token, second.end_token) == (0, len(offsets))


def test_a_character_of_several_tokens_stays_whole() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    messages = conversation(("user", "é🙂"), ("assistant", "🙂"))
    encoding = tokenizer.encode(renderer(CHATML, add_generation_prompt=True)(messages), add_special_tokens=False)

    first, second = message_boundaries(
        messages, renderer(CHATML), renderer(CHATML, add_generation_prompt=True)(messages), encoding.offsets
    )

    assert encoding.ids[first.end_token] == tokenizer.token_to_id("<|im_start|>")
    assert second.num_tokens == 1 + len("assistant\n") + len("🙂".encode()) + 1 + len("\n")


def test_a_conversation_without_messages_has_no_boundaries() -> None:
    assert message_boundaries([], renderer(CHATML), HEADER, words(HEADER)) == ()


@pytest.mark.parametrize("template", [CHATML, DROPS_REASONING])
def test_a_long_conversation_is_rendered_twice(template: str) -> None:
    messages = conversation(*[("user", "One?"), ("assistant", "<think>hm</think>Yes")] * 2000)
    full_text = renderer(template, add_generation_prompt=True)(messages)
    rendered = []

    def counting(marked: Sequence[Mapping[str, str]]) -> str:
        rendered.append(len(marked))
        return marked_renderer(template)(marked)

    def render(_: Sequence[ChatMessage]) -> str:
        pytest.fail("a prefix was rendered")

    boundaries = message_boundaries(messages, render, full_text, words(full_text), render_marked=counting)

    assert rendered == [4000, 4000]
    assert [one.start_token for one in boundaries[1:]] == [one.end_token for one in boundaries[:-1]]


@pytest.mark.parametrize("template", [MERGES_SYSTEM, NEWEST_FIRST])
def test_a_long_conversation_is_refused_if_only_its_prefixes_could_tell(template: str) -> None:
    messages = conversation(("system", "Be brief"), *[("user", "One?"), ("assistant", "Yes")] * MAX_PREFIXES)
    full_text = renderer(template)(messages)

    def render(_: Sequence[ChatMessage]) -> str:
        pytest.fail("a prefix was rendered")

    with pytest.raises(Unsupported, match="over 64 messages"):
        message_boundaries(messages, render, full_text, words(full_text), render_marked=marked_renderer(template))
