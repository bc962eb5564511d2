"""The tokens of a text that is longer than a server tokenizes in one call.

The text is tokenized in pieces that overlap. Two pieces are joined where both have the same tokens at the same places,
`AGREEING` of them one after the other: what a tokenizer does depends on the characters nearby. Where no such place is
found, nothing is returned.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from steer_service.core.errors import InvalidRequest, Unsupported
from steer_service.core.prompt import TextPrompt
from steer_service.core.prompt_tokens import PromptTokens

AGREEING = 8
"""Tokens that two pieces have in common where they are joined."""
OVERLAP = 48
"""Tokens at the end of a piece that the next one has too."""
UNSURE = 8
"""Tokens at the end of a piece that the characters after it may change."""
CHARACTERS_PER_TOKEN = 3
"""Characters of the first piece, for each token that the server takes."""
SHORTEST = 64
"""Characters of a piece at least."""

Tokenize = Callable[[str, bool], Awaitable[PromptTokens]]
"""The tokens of a text, with special tokens or without; raises InvalidRequest (PROMPT_TOO_LONG) if it is too long."""


@dataclass(frozen=True, slots=True)
class _Token:
    """A token at its place in the whole text."""

    id: int
    start: int
    end: int


async def tokens_of_text(prompt: TextPrompt, tokenize: Tokenize, limit: int, wanted: int | None) -> tuple[int, ...]:
    """The tokens of the text, or the first `wanted` of them. `limit`: the most tokens of one call.

    Raises Unsupported if the pieces cannot be joined, or the tokenizer does not know the places of its tokens.
    """
    text, size = prompt.text, max(SHORTEST, CHARACTERS_PER_TOKEN * limit)
    tokens: list[_Token] = []
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    begin = 0
    while True:
        piece, size = await _piece(text, begin, size, tokenize, prompt.add_special_tokens and begin == 0)
        if piece.offsets is None:
            raise _cannot("the tokenizer does not know the places of its tokens")
        special = [place == (0, 0) for place in piece.offsets]
        first = special.index(False) if False in special else len(special)
        last = len(special) - special[::-1].index(False) if False in special else first
        if begin == 0:
            before, after = piece.token_ids[:first], piece.token_ids[last:]
        found = [
            _Token(one, begin + start, begin + end)
            for one, (start, end) in zip(piece.token_ids[first:last], piece.offsets[first:last], strict=True)
        ]
        tokens = _joined(tokens, found)
        is_last = begin + size >= len(text)
        sure = len(tokens) if is_last else len(tokens) - UNSURE
        if is_last or (wanted is not None and len(before) + sure >= wanted):
            ids = (*before, *(token.id for token in tokens), *(after if is_last else ()))
            return ids[:wanted]
        if len(found) < OVERLAP + AGREEING:
            raise _cannot("one call takes too few tokens")
        begin = tokens[-OVERLAP].start


async def _piece(text: str, begin: int, size: int, tokenize: Tokenize, adds_special: bool) -> tuple[PromptTokens, int]:
    """The tokens of at most `size` characters from `begin`, and how many characters they are."""
    while True:
        try:
            return await tokenize(text[begin : begin + size], adds_special), size
        except InvalidRequest as error:
            if error.reason != "PROMPT_TOO_LONG" or size <= SHORTEST:
                raise
            size = max(SHORTEST, size * 2 // 3)


def _joined(tokens: list[_Token], found: list[_Token]) -> list[_Token]:
    """`tokens`, continued by those of the next piece."""
    if not tokens:
        return found
    index_of = {token: index for index, token in enumerate(tokens) if index >= len(tokens) - OVERLAP}
    for index, token in enumerate(found):
        at = index_of.get(token)
        if at is None or at + AGREEING > len(tokens) - UNSURE:
            continue
        if tokens[at : at + AGREEING] == found[index : index + AGREEING]:
            return tokens[:at] + found[index:]
    raise _cannot("its pieces do not have the same tokens")


def _cannot(why: str) -> Unsupported:
    return Unsupported(f"the tokens of a long text are not known: {why}", reason="TOKENS_UNKNOWN", field="prompt")
