"""The tokens of words that must not be generated, with the meaning that vLLM gives them."""

from collections.abc import Sequence
from typing import Any

from steer_service.core.backend import ModelInfo
from steer_service.core.errors import InvalidRequest, within
from steer_service.core.number_limits import MAX_BAD_WORD_TOKENS


def bad_word_tokens(words: Sequence[str], tokenizer: Any, info: ModelInfo) -> tuple[tuple[int, ...], ...]:
    """The token sequences of `words`: of each as it is, and after a space if it is then one other token sequence.

    Raises InvalidRequest, with the word, for one without tokens or with tokens that the model does not have, and for
    too many tokens. Relies on nothing of vLLM, but must agree with `SamplingParams.update_from_tokenizer`.
    """
    found: list[tuple[int, ...]] = []
    for index, word in enumerate(words):
        bare, spaced = (
            tuple(tokenizer.encode(prefix + word.lstrip(), add_special_tokens=False)) for prefix in ("", " ")
        )
        with within(f"sampling.bad_words[{index}]"):
            if not bare:
                raise InvalidRequest("the word has no tokens", reason="BAD_WORD")
            if max((*bare, *spaced)) >= info.vocab_size:
                raise InvalidRequest("the word has tokens that the model does not have", reason="BAD_WORD")
        found.append(bare)
        if spaced and spaced[0] != bare[0] and len(spaced) == len(bare):
            found.append(spaced)
    count = sum(map(len, found))
    if count > MAX_BAD_WORD_TOKENS:
        raise InvalidRequest(
            f"the words have {count} tokens, at most {MAX_BAD_WORD_TOKENS}",
            reason="BAD_WORD",
            field="sampling.bad_words",
        )
    return tuple(found)
