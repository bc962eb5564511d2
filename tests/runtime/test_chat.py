"""The tokens of each message in a rendered conversation."""

import re
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from steer_service.core.capture import MessageBoundary
from steer_service.core.prompt import ChatMessage
from steer_service.runtime.chat import message_boundaries

HEADER = "<|im_start|>assistant\n"


def conversation(*turns: tuple[str, str]) -> list[ChatMessage]:
    return [ChatMessage(role=role, content=content) for role, content in turns]


def chatml(messages: Sequence[ChatMessage]) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation with the header of an answer, and the characters of each message's own text."""
    text, spans = "", []
    for message in messages:
        text += f"<|im_start|>{message.role}\n"
        spans.append((len(text), len(text) + len(message.content)))
        text += message.content + "<|im_end|>\n"
    return text + HEADER, spans


def words(text: str) -> list[tuple[int, int]]:
    """Character spans of special tokens, words, and single other characters."""
    return [match.span() for match in re.finditer(r"<\|\w+\|>|\w+|\s|.", text)]


MESSAGES = conversation(("user", "one two"), ("assistant", ""), ("user", "four"))


def test_a_message_has_the_tokens_of_its_text_and_none_of_the_template() -> None:
    text, spans = chatml(MESSAGES)
    offsets = words(text)

    boundaries = message_boundaries(MESSAGES, spans, offsets)

    assert [(one.role, one.content) for one in boundaries] == [("user", "one two"), ("assistant", ""), ("user", "four")]
    own = [[text[a:b] for a, b in offsets[one.start_token : one.end_token]] for one in boundaries]
    assert own == [["one", " ", "two"], [], ["four"]]


@given(st.data())
def test_a_token_with_a_character_of_a_message_belongs_to_it(data: st.DataObject) -> None:
    text, spans = chatml(MESSAGES)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(text) - 1), max_size=40)))
    offsets = list(zip([0, *cuts], [*cuts, len(text)], strict=True))

    boundaries = message_boundaries(MESSAGES, spans, offsets)

    done = 0
    for boundary, (first, end) in zip(boundaries, spans, strict=True):
        inside = {index for index, (a, b) in enumerate(offsets) if max(a, first) < min(b, end)}
        assert set(range(boundary.start_token, boundary.end_token)) == inside - set(range(done))
        assert boundary.start_token >= done
        done = boundary.end_token


def test_a_token_of_two_messages_belongs_to_the_first() -> None:
    messages = conversation(("user", "ab"), ("assistant", "cd"))

    boundaries = message_boundaries(messages, [(0, 2), (2, 4)], [(0, 1), (1, 3), (3, 4)])

    assert boundaries == (MessageBoundary("user", "ab", 0, 2), MessageBoundary("assistant", "cd", 2, 3))


def test_a_word_that_begins_with_its_space_belongs_to_its_message() -> None:
    [boundary] = message_boundaries(conversation(("user", "Hello")), [(7, 12)], [(0, 6), (6, 12), (12, 17)])

    assert (boundary.start_token, boundary.end_token) == (1, 2)


def test_tokens_that_stand_for_no_text_belong_to_no_message_unless_inside_one() -> None:
    messages = conversation(("user", "Hello"), ("assistant", "Hi"))
    offsets = [(0, 0), (0, 2), (0, 0), (2, 5), (5, 7), (0, 0)]  # what tokenizers report for such tokens

    first, second = message_boundaries(messages, [(0, 5), (5, 7)], offsets)

    assert (first.start_token, first.end_token) == (1, 4)
    assert (second.start_token, second.end_token) == (4, 5)


def test_a_character_of_several_tokens_stays_whole() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    messages = conversation(("user", "é🙂"), ("assistant", "🙂"))
    text, spans = chatml(messages)
    encoding = tokenizer.encode(text, add_special_tokens=False)

    first, second = message_boundaries(messages, spans, encoding.offsets)

    assert (first.num_tokens, second.num_tokens) == (len("é🙂".encode()), len("🙂".encode()))
    assert encoding.ids[first.end_token] == encoding.ids[second.end_token] == tokenizer.token_to_id("<|im_end|>")
    assert encoding.ids[first.start_token - 1] == encoding.ids[second.start_token - 1]


def test_a_conversation_without_messages_has_no_boundaries() -> None:
    assert message_boundaries([], [], words(HEADER)) == ()
