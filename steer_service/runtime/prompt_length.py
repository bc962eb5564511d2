"""Refuses a text that is longer than the model can take before all of it is tokenised.

Two facts of a tokenizer make this sound. Both are read from its definition, and used only where they are proven:

* No token is longer than the longest in the vocabulary. A text has at least as many tokens as its characters of one
  class (letters and digits, whitespace, other ASCII, others), divided by the most that one token holds.
* If no token holds a letter or digit followed by a space or a line feed, no token crosses such a place. The tokens
  of the text up to there are then tokens of the whole text.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from steer_service.core.backend import ModelInfo
from steer_service.core.checks import SHORTEN, check_prompt_length, described_limit
from steer_service.core.errors import InvalidRequest

CHARACTERS_PER_TOKEN = 4
"""A text with at most this many characters for each token of the limit is tokenised without further checks."""

UNPROVEN_CHARACTERS_PER_TOKEN = 64
"""The most characters for each token of the limit, for a tokenizer of which nothing is proven."""

SLACK = 16
"""Tokens that the beginning of a text may have more than the whole text has there: prefix spaces, special tokens."""

CUT = re.compile(r"[A-Za-z0-9][ \n]")
CUT_BYTES = re.compile(CUT.pattern.encode())
CUT_WINDOW = 4096
"""Characters in which a place to cut is looked for."""

PIECE = 1 << 20

LETTER, SPACE, OTHER_ASCII, OTHER, NO_CLASS = range(5)
"""Classes of bytes in UTF-8: each other character has one first byte, and bytes that continue it have no class."""

CLASS_OF_BYTE = bytes(
    SPACE
    if byte in b" \t\n\r\v\f"
    else LETTER
    if chr(byte).isalnum() and byte < 128
    else OTHER_ASCII
    if byte < 128
    else NO_CLASS
    if byte < 0xC0
    else OTHER
    for byte in range(256)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFacts:
    """What is proven of a tokenizer."""

    longest: tuple[int, ...] = ()
    """Class -> the most of it that one token holds, at least 1. Empty if nothing is proven."""
    composes: bool = False
    """It composes characters first, so that fewer remain."""
    can_cut: bool = False
    """No token crosses a place that CUT matches."""
    dropped: bytes = b""
    """Bytes without a token: the tokenizer leaves them out."""

    @classmethod
    def of(cls, tokenizer: Any) -> "TokenizerFacts":
        """Facts about a tokenizer of transformers; none if it is not one of the `tokenizers` library."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        return cls.read(json.loads(backend.to_str())) if backend is not None else cls()

    @classmethod
    def read(cls, definition: Mapping[str, Any]) -> "TokenizerFacts":
        """Facts about a tokenizer, from its definition in `tokenizer.json`."""
        normalizers, splitters = (_parts(definition.get(key)) for key in ("normalizer", "pre_tokenizer"))
        added = definition.get("added_tokens") or []
        if not all(map(_keeps_characters, [*normalizers, *splitters])):
            return cls()
        is_byte_level = any(part["type"] == "ByteLevel" for part in [*normalizers, *splitters])
        tokens = _texts(definition["model"], is_byte_level)
        if tokens is None:
            return cls()
        dropped = bytes(range(256)).translate(None, b"".join(token for token in tokens if len(token) == 1))
        tokens += [entry["content"].encode() for entry in added]
        classes = [token.translate(CLASS_OF_BYTE) for token in tokens]
        longest = [max((one.count(kind) for one in classes), default=0) or 1 for kind in range(NO_CLASS)]
        if any(entry.get("lstrip") or entry.get("rstrip") for entry in added):
            longest[SPACE] = 1 << 62  # such a token takes any whitespace beside it
        composes = any(part["type"] == "NFC" for part in normalizers)
        return cls(
            longest=tuple(longest),
            composes=composes,
            can_cut=not any(CUT_BYTES.search(token) for token in tokens),
            dropped=dropped if is_byte_level else b"",
        )

    def fewest_tokens(self, text: str) -> int:
        """A number of tokens that `text` has at least."""
        if not self.longest or (self.composes and not unicodedata.is_normalized("NFC", text)):
            return 0
        counts = np.zeros(256, np.int64)
        for start in range(0, len(text), PIECE):
            data = text[start : start + PIECE].encode()
            counts += np.bincount(np.frombuffer(data, np.uint8), minlength=256)
        counts[list(self.dropped)] = 0
        of_class = np.bincount(np.frombuffer(CLASS_OF_BYTE, np.uint8), weights=counts, minlength=NO_CLASS)
        return max(int(-(-of_class[kind] // self.longest[kind])) for kind in range(NO_CLASS))


class LengthCheck:
    """Refuses the prompt of one request if it is too long for the model, as early as possible."""

    def __init__(
        self, tokenizer: Any, facts: Callable[[], TokenizerFacts], info: ModelInfo, *, is_rows_only: bool
    ) -> None:
        """`facts`: those of the tokenizer, asked for only if a text is long. `is_rows_only`: nothing is generated."""
        self._tokenizer = tokenizer
        self._facts = facts
        self._info = info
        self._is_rows_only = is_rows_only

    def text(self, text: str) -> None:
        """Raises InvalidRequest for a text that surely has too many tokens."""
        most = self._info.most_prompt_tokens(is_rows_only=self._is_rows_only)
        if len(text) > _without_check(most):
            described = described_limit(self._info, is_rows_only=self._is_rows_only)
            check_text_length(text, self._tokenizer, self._facts(), most, described)

    def tokens(self, count: int) -> None:
        """Raises InvalidRequest for a prompt of too many tokens, or none."""
        check_prompt_length(count, self._info, is_rows_only=self._is_rows_only)


def check_text_length(text: str, tokenizer: Any, facts: TokenizerFacts, most: int, described: str) -> None:
    """Raises InvalidRequest if `text` has too many tokens, as far as this is known without tokenising it all.

    `most`: the tokens that it may have; `described`: that limit in words. The work grows with the limit, and with the
    text only by reading its characters.
    """
    size = _without_check(most)
    too_long = InvalidRequest(
        f"the prompt of {len(text)} characters has more tokens than {described}; {SHORTEN}",
        reason="PROMPT_TOO_LONG",
        field="prompt",
    )
    if len(text) <= size:
        return
    if facts.fewest_tokens(text) > most:
        raise too_long
    if not facts.longest and len(text) > UNPROVEN_CHARACTERS_PER_TOKEN * max(most, CUT_WINDOW):
        raise too_long
    while facts.can_cut and size < len(text):
        end = _last_cut(text, size)
        if end and len(tokenizer(text[:end], add_special_tokens=False)["input_ids"]) - SLACK > most:
            raise too_long
        size *= 2


def _without_check(most: int) -> int:
    return max(CHARACTERS_PER_TOKEN * most, CUT_WINDOW)


def _last_cut(text: str, size: int) -> int:
    """The last place to cut `text` in the window that ends at `size`; 0 if there is none."""
    window = size - CUT_WINDOW
    places = [found.start() + 1 for found in CUT.finditer(text, window, size)]
    return places[-1] if places else 0


def _parts(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [part for one in step.get("normalizers") or step.get("pretokenizers") or [] for part in _parts(one)]
    return [step]


def _keeps_characters(part: Mapping[str, Any]) -> bool:
    """True if a step of the tokenizer only adds, composes or separates characters."""
    match part["type"]:
        case "Replace":
            return len(part["pattern"].get("String", "")) == 1 and len(part["content"]) >= 1
        case "Split" | "Punctuation":
            return str(part.get("behavior")) != "Removed"
        case kind:
            return kind in {"NFC", "Prepend", "ByteLevel", "Metaspace", "Digits", "UnicodeScripts"}


def _texts(model: Mapping[str, Any], is_byte_level: bool) -> list[bytes] | None:
    """The tokens of the vocabulary in UTF-8; None if an unknown token may stand for any number of characters."""
    vocabulary: Iterable[str] = (
        model["vocab"] if isinstance(model["vocab"], dict) else [entry[0] for entry in model["vocab"]]
    )
    known = set(vocabulary)
    has_bytes = bool(model.get("byte_fallback")) and all(f"<0x{byte:02X}>" in known for byte in range(256))
    if model["type"] not in ("BPE", "Unigram") or not (is_byte_level or has_bytes):
        return None
    if is_byte_level:
        return [b"".join(BYTE_OF_LETTER.get(letter, letter.encode()) for letter in token) for token in known]
    return [token.replace("▁", " ").encode() for token in known]


def _byte_letters() -> dict[str, bytes]:
    """Letter -> byte, of the alphabet in which byte-level tokenizers write their vocabulary (that of GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): bytes([byte]) for byte in printable}
    return letters | {chr(256 + number): bytes([byte]) for number, byte in enumerate(others)}


BYTE_OF_LETTER = _byte_letters()
