"""The text of a model's tokens."""

import re
from collections.abc import Sequence
from typing import Any, Protocol

BYTE = re.compile("<0x[0-9A-F]{2}>")
"""A token of one byte, in a vocabulary of characters."""


class TokenTexts(Protocol):
    """How token ids become text; shared by all outputs of a model."""

    is_concatenated: bool
    """True: the bytes of a sequence are those of its tokens, one after the other, whatever stands before them."""

    def decode(self, token_ids: Sequence[int], *, skip_special: bool) -> str:
        """The text of a sequence, with U+FFFD for bytes that are no character."""

    def of_token(self, token_id: int, *, skip_special: bool) -> str:
        """The text of one token, alone; "" if it is silent."""

    def has_bytes(self, token_id: int) -> bool:
        """True for a token that may end within a character."""

    def is_silent(self, token_id: int, *, skip_special: bool) -> bool:
        """True for a token that leaves no trace in the text: a special one that is skipped, or an unknown id."""


def text_alone(texts: TokenTexts, token_id: int) -> str:
    """The text of a token by itself, special ones too; "" for an id that the tokenizer does not have."""
    return "" if texts.is_silent(token_id, skip_special=False) else texts.of_token(token_id, skip_special=False)


def special_tokens(tokenizer: Any) -> frozenset[int]:
    """Ids of the special tokens of a tokenizer of transformers, or of one with the same methods."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return frozenset(tokenizer.all_special_ids)
    return frozenset(token for token, entry in backend.get_added_tokens_decoder().items() if entry.special)


def special_token_ids(tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """Its special tokens that a model of `vocab_size` tokens has, ascending."""
    return tuple(sorted(token for token in special_tokens(tokenizer) if token < vocab_size))


class TokenizerTexts:
    """TokenTexts of a tokenizer of transformers, or of one with the same methods."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._texts: tuple[dict[int, str], dict[int, str]] = ({}, {})  # without and with special tokens skipped
        self._known: dict[int, bool] = {}
        self._special = special_tokens(tokenizer)
        self.is_concatenated = type(getattr(self._backend, "decoder", None)).__name__ == "ByteLevel"

    def decode(self, token_ids: Sequence[int], *, skip_special: bool) -> str:
        """See TokenTexts."""
        if self._backend is not None:
            return str(self._backend.decode(token_ids, skip_special_tokens=skip_special))
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=skip_special))

    def of_token(self, token_id: int, *, skip_special: bool) -> str:
        """See TokenTexts."""
        text = self._texts[skip_special].get(token_id)
        if text is None:
            text = self._texts[skip_special][token_id] = self.decode([token_id], skip_special=skip_special)
        return text

    def has_bytes(self, token_id: int) -> bool:
        """See TokenTexts."""
        if self.is_concatenated or self._backend is None:
            return True
        return BYTE.fullmatch(self._backend.id_to_token(token_id) or "") is not None

    def is_silent(self, token_id: int, *, skip_special: bool) -> bool:
        """See TokenTexts."""
        if skip_special and token_id in self._special:
            return True
        is_known = self._known.get(token_id)
        if is_known is None:
            is_known = self._known[token_id] = self._has(token_id)
        return not is_known

    def _has(self, token_id: int) -> bool:
        if self._backend is not None:
            return self._backend.id_to_token(token_id) is not None
        try:
            return self._tokenizer.convert_ids_to_tokens([token_id])[0] is not None
        except (IndexError, KeyError):  # slow tokenizers raise for ids beyond their vocabulary
            return False
