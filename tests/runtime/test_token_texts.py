"""The text of one token by itself, which stands beside its log-probability."""

import pytest
from transformers import PreTrainedTokenizerFast

from steer_service.runtime.token_texts import TokenizerTexts, text_alone
from tests.runtime.tokenizers_for_text import byte_fallback, byte_level, metaspace


@pytest.mark.parametrize("tokenizer", [byte_level(), metaspace(), byte_fallback()], ids=["bytes", "words", "fallback"])
def test_it_is_what_the_tokenizer_gives_for_the_id_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = TokenizerTexts(tokenizer)

    for token in range(len(tokenizer)):
        assert text_alone(texts, token) == tokenizer.decode([token], skip_special_tokens=False)


def test_an_id_that_the_tokenizer_does_not_have_has_no_text() -> None:
    assert text_alone(TokenizerTexts(byte_level()), 10**6) == ""
