"""Stop strings end an output where its own text has them, whatever the prompt says and however tokens cut them."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.sampling_options import DEFAULTS
from steer_service.runtime.output_text import NewText, OutputText
from steer_service.runtime.token_texts import TokenizerTexts
from steer_service.testing.fake_backend import FakeBackend
from tests.runtime.tokenizers_for_text import LETTERS, byte_level, decode, metaspace, text_by_difference, text_of_bytes

BYTE_LEVEL, METASPACE = byte_level(), metaspace()
TEXTS = TokenizerTexts(BYTE_LEVEL)
LETTER_OF = {byte: letter for letter, byte in LETTERS.items()}


def output(prompt: str = "x", **options: object) -> OutputText:
    return OutputText(TEXTS, BYTE_LEVEL.encode(prompt), replace(DEFAULTS, **options))  # type: ignore[arg-type]


def letters(text: str) -> list[int]:
    """One token per byte."""
    return BYTE_LEVEL.convert_tokens_to_ids([LETTER_OF[byte] for byte in text.encode()])


def test_a_stop_string_of_the_prompt_does_not_end_the_output() -> None:
    text = output("ab STOP", stop=("STOP", "Pa"))

    assert text.add(letters("aSTO")).text == "a"
    assert text.stop is None
    assert text.add(letters("P")) == NewText("", 1)
    assert text.stop == "STOP"


@pytest.mark.parametrize(("include", "shown"), [(False, "a"), (True, "aSTOP")])
def test_tokens_after_a_stop_string_are_not_the_outputs(include: bool, shown: str) -> None:
    text = output(stop=("STOP",), include_stop=include)

    assert text.add(letters("aSTOPbc"), is_over=True) == NewText(shown, 5)


def test_the_stop_string_that_ends_first_counts_and_the_first_of_two_that_end_together() -> None:
    text = output(stop=("bcd", "c", "bc"))

    assert text.add(letters("abcd")) == NewText("ab", 3)
    assert text.stop == "c"


def test_what_may_begin_a_stop_string_is_sent_once_it_does_not() -> None:
    text = output(stop=("STOP",))

    assert [text.add(letters(letter)).text for letter in "aSTx"] == ["", "", "", "a"]
    assert text.add(letters("y"), is_over=True).text == "STxy"
    assert text.stop is None


def test_a_stop_string_counts_only_after_the_least_number_of_tokens() -> None:
    text = output(stop=("b",), min_tokens=2)

    assert text.add(letters("ab")) == NewText("ab", 2)
    assert text.add(letters("bc")) == NewText("", 1)
    assert text.stop == "b"


@pytest.mark.parametrize(("include", "shown"), [(False, "a"), (True, "ab")])
def test_the_text_of_a_stop_token_is_left_out_unless_stops_are_included(include: bool, shown: str) -> None:
    text = output(stop=("b", "zzz"), include_stop=include)

    assert text.add(letters("ab"), is_over=True, ends_with_stop=True) == NewText(shown, 2)
    assert text.stop is None


def test_an_unfinished_character_at_the_end_is_shown_as_one() -> None:
    text = output()

    assert text.add(letters("a視")[:-1], is_over=True) == NewText("a\ufffd", 3)


def test_an_output_may_end_without_a_token() -> None:
    text = output(stop=("ST",))

    assert text.add(letters("aS")).text == "a"
    assert text.add([], is_over=True) == NewText("S", 0)


@pytest.mark.parametrize("include", [False, True])
async def test_the_fake_backend_ends_at_a_stop_string_over_two_tokens(include: bool) -> None:
    fake = FakeBackend()
    [whole], _ = await fake.generate("p", max_tokens=6, raw_output=True)
    text, ids = whole.outputs[0].text, whole.outputs[0].token_ids
    stop = f"{str(ids[1])[-2:]} t{str(ids[2])[:1]}"

    [generation], _ = await fake.generate("p", max_tokens=6, stop=[stop], include_stop=include, raw_output=True)

    [output] = generation.outputs
    assert output.text == text[: text.index(stop) + (len(stop) if include else 0)]
    assert (output.stop, output.token_ids) == (stop, ids[:3])


@given(
    st.lists(st.integers(0, len(BYTE_LEVEL) - 1), min_size=1, max_size=8),
    st.lists(st.integers(0, len(BYTE_LEVEL) - 1), min_size=1, max_size=40),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_the_text_ends_at_its_first_stop_string(
    prompt: list[int], generated: list[int], include: bool, skip: bool, data: st.DataObject
) -> None:
    whole = text_of_bytes(BYTE_LEVEL, prompt, generated, skip)
    stops = tuple(data.draw(st.lists(pieces_of(whole), min_size=1, max_size=3)))
    options = replace(DEFAULTS, stop=stops, include_stop=include, skip_special_tokens=skip)
    text = OutputText(TokenizerTexts(BYTE_LEVEL), prompt, options)

    got, count = "", 0
    while count < len(generated) and text.stop is None:
        size = data.draw(st.integers(1, 3))
        new = text.add(generated[count : count + size], is_over=count + size >= len(generated))
        got, count = got + new.text, count + new.token_count

    ends = sorted((whole.find(stop) + len(stop), index) for index, stop in enumerate(stops) if stop in whole)
    if not ends:
        assert (got, text.stop, count) == (whole, None, len(generated))
        return
    stop = stops[ends[0][1]]
    assert text.stop is not None
    assert got == whole[: whole.find(text.stop) + (len(text.stop) if include else 0)]
    assert whole.find(text.stop) + len(text.stop) <= ends[0][0] + longest_token(generated, skip)
    assert text.stop == stop or count  # several may end in the text of one token


def pieces_of(whole: str) -> st.SearchStrategy[str]:
    """Parts of a text, and strings that are not in it."""
    if not whole:
        return st.just("zq")
    starts = st.integers(0, len(whole) - 1)
    return st.one_of(
        st.just("zq"), st.builds(lambda start, size: whole[start : start + size], starts, st.integers(1, 12))
    )


def longest_token(generated: list[int], skip: bool) -> int:
    return max(len(decode(BYTE_LEVEL, [token], skip)) for token in generated) + 4


@given(
    st.lists(st.integers(0, len(METASPACE) - 1), min_size=1, max_size=8),
    st.lists(st.integers(0, len(METASPACE) - 1), min_size=1, max_size=40),
)
def test_words_and_spaces_of_other_tokenizers_are_kept(prompt: list[int], generated: list[int]) -> None:
    text = OutputText(TokenizerTexts(METASPACE), prompt, replace(DEFAULTS, stop=("zq",)))

    got = "".join(text.add([token], is_over=False).text for token in generated) + text.add([], is_over=True).text

    assert got == text_by_difference(METASPACE, prompt, generated, True)
