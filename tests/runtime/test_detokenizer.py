"""The text of generated tokens is decode(prompt + generated) without what began in the prompt, for any tokens."""

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from steer_service.runtime.detokenizer import MOST_PENDING, Detokenizer
from steer_service.runtime.token_texts import TokenizerTexts
from tests.runtime.tokenizers_for_text import (
    REPLACEMENT,
    byte_fallback,
    byte_level,
    bytes_of,
    metaspace,
    text_by_difference,
    text_of_bytes,
)

BYTE_LEVEL, METASPACE, BYTE_FALLBACK = byte_level(), metaspace(), byte_fallback()
UNKNOWN = 5
"""Ids beyond the tokenizer, which some models have."""


def tokens(tokenizer, **limits: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, len(tokenizer) + UNKNOWN - 1), **limits)


def pieces(texts: TokenizerTexts, prompt: Sequence[int], generated: Sequence[int], skip_special: bool) -> list[str]:
    detokenizer = Detokenizer(texts, prompt, skip_special=skip_special)
    return [*map(detokenizer.push, generated), detokenizer.finish()]


SECRET = BYTE_LEVEL.encode("My secret prompt words go here and 視𠜎")
TEXTS = {id(one): TokenizerTexts(one) for one in (BYTE_LEVEL, METASPACE, BYTE_FALLBACK)}


@given(tokens(BYTE_LEVEL, min_size=1, max_size=30), tokens(BYTE_LEVEL, max_size=60), st.booleans())
@example(SECRET[:-1], SECRET[-1:], True)
@example(SECRET[:-1], SECRET[:3], True)
@example(SECRET[:-2], [*SECRET[-2:], *SECRET], True)
def test_bytes_of_any_tokens_become_the_characters_that_were_generated(
    prompt: list[int], generated: list[int], skip_special: bool
) -> None:
    got = "".join(pieces(TEXTS[id(BYTE_LEVEL)], prompt, generated, skip_special))

    assert got == text_of_bytes(BYTE_LEVEL, prompt, generated, skip_special)


CONTINUING = [
    token for token in range(len(BYTE_LEVEL)) if (data := bytes_of(BYTE_LEVEL, token, True)) and data[0] > 127
]


@given(
    tokens(BYTE_LEVEL, min_size=1, max_size=3),
    st.lists(st.sampled_from(CONTINUING), max_size=200),
    tokens(BYTE_LEVEL, max_size=5),
)
def test_a_long_run_of_bytes_that_are_no_characters_is_returned_in_time(
    prompt: list[int], run: list[int], after: list[int]
) -> None:
    got = pieces(TEXTS[id(BYTE_LEVEL)], prompt, [*run, *after], True)

    assert "".join(got) == text_of_bytes(BYTE_LEVEL, prompt, [*run, *after], True)
    for start in range(len(run) - MOST_PENDING - 1):
        assert any(got[start : start + MOST_PENDING + 1])


@given(tokens(METASPACE, min_size=1, max_size=30), tokens(METASPACE, max_size=60), st.booleans())
def test_spaces_of_any_tokens_are_those_of_the_whole_text(
    prompt: list[int], generated: list[int], skip_special: bool
) -> None:
    got = "".join(pieces(TEXTS[id(METASPACE)], prompt, generated, skip_special))

    assert got == text_by_difference(METASPACE, prompt, generated, skip_special)


WORDS = BYTE_FALLBACK.convert_tokens_to_ids(["▁", "a", "b", "▁the", "視", "ab"])
CHARACTERS = [BYTE_FALLBACK.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in one.encode()]) for one in "é視𠜎"]


@given(
    st.lists(st.sampled_from([*([word] for word in WORDS), *CHARACTERS]), min_size=1, max_size=20),
    st.data(),
    st.booleans(),
)
def test_characters_of_single_bytes_come_whole(groups: list[list[int]], data: st.DataObject, skip: bool) -> None:
    sequence = [token for group in groups for token in group]
    cut = data.draw(st.integers(1, len(sequence)))
    starts = [sum(map(len, groups[:index])) for index in range(len(groups) + 1)]
    first = next(start for start in starts if start >= cut)

    got = pieces(TEXTS[id(BYTE_FALLBACK)], sequence[:cut], sequence[cut:], skip)

    assert "".join(got) == text_by_difference(BYTE_FALLBACK, sequence[:first], sequence[first:], skip)
    assert all(REPLACEMENT not in piece for piece in got)


@given(tokens(BYTE_FALLBACK, min_size=1, max_size=10), tokens(BYTE_FALLBACK, max_size=80), st.booleans())
def test_no_tokens_of_single_bytes_fail(prompt: list[int], generated: list[int], skip_special: bool) -> None:
    pieces(TEXTS[id(BYTE_FALLBACK)], prompt, generated, skip_special)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, METASPACE, BYTE_FALLBACK], ids=["bytes", "metaspace", "fallback"])
@pytest.mark.parametrize("kind", ["special", "unknown", "first", "last"])
def test_the_window_does_not_grow(tokenizer, kind: str) -> None:
    token = {
        "special": tokenizer.convert_tokens_to_ids("<|end|>"),
        "unknown": len(tokenizer),
        "first": 0,
        "last": len(tokenizer) - 1,
    }[kind]
    decoded = []

    class Watched(TokenizerTexts):
        def decode(self, token_ids, *, skip_special):
            decoded.append(len(token_ids))
            return super().decode(token_ids, skip_special=skip_special)

    pieces(Watched(tokenizer), [1, 2, 3], [token] * 500, True)

    assert max(decoded) <= 2 * MOST_PENDING
