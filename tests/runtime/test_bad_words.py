"""The tokens of words that must not be generated are those that vLLM finds."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from steer_service.core.errors import InvalidRequest
from steer_service.runtime.bad_words import bad_word_tokens
from steer_service.testing.fake_backend import FAKE_MODEL
from tests.runtime.tokenizers_for_text import byte_fallback, byte_level, metaspace

TOKENIZERS = [byte_level(), metaspace(), byte_fallback()]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bytes", "words", "fallback"])
@given(st.lists(st.text("abc hé", min_size=1, max_size=8), min_size=1, max_size=4, unique=True))
def test_they_are_those_of_vllm(tokenizer: object, words: list[str]) -> None:
    params = SamplingParams(bad_words=words)
    theirs = SimpleNamespace(encode=lambda text, add_special_tokens: tokenizer.encode(text, add_special_tokens=False))
    theirs.max_token_id = FAKE_MODEL.vocab_size
    try:
        params.update_from_tokenizer(theirs)  # type: ignore[arg-type]
    except VLLMValidationError:
        with pytest.raises(InvalidRequest):
            bad_word_tokens(words, tokenizer, FAKE_MODEL)
        return
    assert [list(one) for one in bad_word_tokens(words, tokenizer, FAKE_MODEL)] == params.bad_words_token_ids


def test_words_that_cannot_be_excluded_are_refused_by_name() -> None:
    tokenizer = byte_level()
    cases = {
        ("a", "  "): (FAKE_MODEL, "sampling.bad_words[1]"),
        ("a",): (replace(FAKE_MODEL, vocab_size=1), "sampling.bad_words[0]"),
        ("é" * 256,) * 4: (FAKE_MODEL, "sampling.bad_words"),
    }
    for words, (info, field) in cases.items():
        with pytest.raises(InvalidRequest) as refused:
            bad_word_tokens(words, tokenizer, info)
        assert (refused.value.field, refused.value.reason) == (field, "BAD_WORD")
