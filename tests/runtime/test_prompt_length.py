"""Texts that are too long are refused early; a text that fits never is."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from steer_service.core.errors import InvalidRequest
from steer_service.runtime.prompt_length import (
    CUT_WINDOW,
    SLACK,
    UNPROVEN_CHARACTERS_PER_TOKEN,
    TokenizerFacts,
    check_text_length,
)

CORPUS = ["the three of them met at the harbour before sunrise " * 3, "aaaa    bbbb\n\n\n====", "視𠜎 é ñ 🙂 " * 4] * 4
LETTERS = "ab  \n=-視é🙂\u0301\u00e9t"
TEXTS = st.text(st.sampled_from(LETTERS), max_size=400)


def byte_level(normalizer: Any = None, *, alphabet: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    initial = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=initial, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken("<|end|>")])
    return tokenizer


def sentencepiece(*, byte_fallback: bool) -> Tokenizer:
    """The shape of Llama 2's: no words, spaces are letters."""
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), "<unk>", "▁", "a", "b", "▁a", "▁▁", "▁▁▁▁", "ab", "=", "視"]
    tokenizer = Tokenizer(
        models.Unigram([(piece, -len(piece)) for piece in pieces], unk_id=256, byte_fallback=byte_fallback)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def facts_of(tokenizer: Tokenizer) -> TokenizerFacts:
    return TokenizerFacts.read(json.loads(tokenizer.to_str()))


PROVEN = {
    "byte level": byte_level(),
    "without some bytes": byte_level(alphabet=False),
    "composing": byte_level(normalizers.NFC()),
    "sentencepiece": sentencepiece(byte_fallback=True),
}


@pytest.mark.parametrize("name", PROVEN)
@given(text=TEXTS)
def test_a_text_has_at_least_the_tokens_that_are_claimed(name: str, text: str) -> None:
    facts = facts_of(PROVEN[name])

    assert facts.longest
    assert facts.fewest_tokens(text) <= len(PROVEN[name].encode(text).ids)


@pytest.mark.parametrize("name", PROVEN)
@given(text=TEXTS, more=TEXTS)
def test_no_token_crosses_a_place_to_cut(name: str, text: str, more: str) -> None:
    tokenizer = PROVEN[name]

    assert facts_of(tokenizer).can_cut
    whole = len(tokenizer.encode(f"{text}a {more}").ids)
    assert len(tokenizer.encode(f"{text}a").ids) <= whole + SLACK


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_level(normalizers.Strip()),
        byte_level(normalizers.Replace("ab", "a")),
        sentencepiece(byte_fallback=False),
        Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")),
    ],
    ids=["strips", "shortens", "unknown characters are one token", "words"],
)
def test_nothing_is_claimed_of_tokenizers_that_lose_characters(tokenizer: Tokenizer) -> None:
    assert facts_of(tokenizer) == TokenizerFacts()


def test_whitespace_that_a_special_token_takes_is_not_counted() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    text = " " * 1000 + "<mask>"

    assert facts_of(tokenizer).fewest_tokens(text) <= len(tokenizer.encode(text).ids) <= 2


def test_tokens_of_several_words_are_not_cut() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("tool call")])

    assert not facts_of(tokenizer).can_cut


class Counting:
    """A tokenizer that counts the characters it tokenises."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.backend_tokenizer = tokenizer
        self.characters = 0
        self._tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)

    def __call__(self, text: str, **options: Any) -> Any:
        self.characters += len(text)
        return self._tokenizer(text, **options)


LIMIT = 1024


@pytest.mark.parametrize("text", ["a", " ", "=", "視", "ab ", "the harbour before sunrise\n"])
def test_a_long_text_is_refused_after_little_work(text: str) -> None:
    tokenizer = Counting(byte_level())
    text = (text * 1_000_000)[:1_000_000]

    with pytest.raises(InvalidRequest, match="1000000 characters has more tokens") as raised:
        check_text_length(text, tokenizer, TokenizerFacts.of(tokenizer), LIMIT, "the limit")

    assert (raised.value.reason, raised.value.field) == ("PROMPT_TOO_LONG", "prompt")
    assert tokenizer.characters <= 16 * LIMIT


def test_a_long_text_of_few_tokens_is_accepted() -> None:
    tokenizer = Counting(byte_level())
    text = ("the harbour before sunrise " * 1000)[: 8 * LIMIT]
    tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])

    check_text_length(text, tokenizer, TokenizerFacts.of(tokenizer), tokens, "the limit")
    with pytest.raises(InvalidRequest):
        check_text_length(text * 8, tokenizer, TokenizerFacts.of(tokenizer), tokens - 1, "the limit")


def test_a_tokenizer_of_which_nothing_is_proven_reads_a_limited_text() -> None:
    tokenizer = Counting(sentencepiece(byte_fallback=False))
    most = UNPROVEN_CHARACTERS_PER_TOKEN * CUT_WINDOW

    check_text_length("a" * most, tokenizer, TokenizerFacts.of(tokenizer), LIMIT, "the limit")
    with pytest.raises(InvalidRequest, match="has more tokens"):
        check_text_length("a" * (most + 1), tokenizer, TokenizerFacts.of(tokenizer), LIMIT, "the limit")
