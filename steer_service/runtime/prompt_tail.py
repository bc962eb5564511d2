"""The last tokens of a prompt, also of a text that is far longer than the model can take.

The meaning is vLLM's for `truncate_prompt_tokens`: of a text, the special tokens that the tokenizer adds stay, and its
own tokens are cut from the left; token ids and the text of a chat are cut as they are. vLLM leaves this to the
tokenizer, whose state is no use where several prompts are tokenised at a time. tests/runtime/test_prompt_tail.py
compares the two.

Of a long text, only the end is tokenised if no token crosses the place where it is cut; see `prompt_length`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from steer_service.core.errors import InvalidRequest
from steer_service.runtime.chat_marks import Span
from steer_service.runtime.prompt_length import (
    CHARACTERS_PER_TOKEN,
    CUT,
    CUT_WINDOW,
    SLACK,
    UNPROVEN_CHARACTERS_PER_TOKEN,
    TokenizerFacts,
)

ANY_TEXT = "a"
"""Its tokens show which special tokens the tokenizer adds before and after those of a text."""


class PromptTail:
    """Cuts one prompt to its last tokens."""

    def __init__(self, keep: int, tokenizer: Any, facts: Callable[[], TokenizerFacts]) -> None:
        """`keep`: tokens of the prompt at most, at least 1. `facts`: those of the tokenizer, asked for if needed."""
        self._keep = keep
        self._tokenizer = tokenizer
        self._facts = facts

    @property
    def most_characters(self) -> int:
        """Characters of a text that may be tokenised, or searched for its messages, as a whole."""
        return UNPROVEN_CHARACTERS_PER_TOKEN * max(self._keep, CUT_WINDOW)

    def of_tokens(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        """The last of `token_ids`."""
        return tuple(token_ids[-self._keep :])

    def of_text(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """The tokens of `text`, which is cut, and the special tokens, which are not.

        Raises InvalidRequest (`truncate_prompt_tokens`) if nothing is left beside these, and for a text that is too
        long to be cut.
        """
        start = self._start_of(text)
        if not start:
            token_ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
            if len(token_ids) <= self._keep:
                return tuple(token_ids)
        before, after = self._special_tokens() if add_special_tokens else ((), ())
        room = self._keep - len(before) - len(after)
        if room < 1:
            raise InvalidRequest(
                f"{self._keep} tokens have no place for the text beside {len(before) + len(after)} special tokens",
                reason="OUT_OF_RANGE",
                field="truncate_prompt_tokens",
            )
        return (*before, *self._tokenizer.encode(text[start:], add_special_tokens=False)[-room:], *after)

    def of_chat(self, text: str, *, with_offsets: bool) -> tuple[tuple[int, ...], tuple[Span, ...] | None]:
        """The tokens of the text of a chat, and their characters in it if they are asked for and known."""
        start = self._start_of(text)
        if not (with_offsets and self._tokenizer.is_fast):
            return self.of_tokens(self._tokenizer.encode(text[start:], add_special_tokens=False)), None
        encoded = self._tokenizer(text[start:], add_special_tokens=False, return_offsets_mapping=True)
        spans = encoded["offset_mapping"][-self._keep :]
        return self.of_tokens(encoded["input_ids"]), tuple((first + start, end + start) for first, end in spans)

    def _start_of(self, text: str) -> int:
        """A place from which `text` has the same last tokens, as many as are kept; 0 for a text of usual length.

        Raises InvalidRequest for a long text that must be tokenised as a whole.
        """
        tokens = self._keep
        size, most = max(CHARACTERS_PER_TOKEN * tokens, CUT_WINDOW), self.most_characters
        if len(text) <= size:
            return 0
        facts = self._facts()
        while facts.can_cut and size < min(len(text), most):
            place = CUT.search(text, len(text) - size, len(text) - size + CUT_WINDOW)
            start = place.start() + 1 if place is not None else 0
            if start and len(self._tokenizer(text[start:], add_special_tokens=False)["input_ids"]) >= tokens + SLACK:
                return start
            size *= 2
        if len(text) > most:
            raise InvalidRequest(
                f"the text of {len(text)} characters is too long to find its last {tokens} tokens; send its end",
                reason="PROMPT_TOO_LONG",
                field="prompt",
            )
        return 0

    def _special_tokens(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the tokenizer adds before the tokens of a text, and after them."""
        own = self._tokenizer.encode(ANY_TEXT, add_special_tokens=False)
        whole = self._tokenizer.encode(ANY_TEXT, add_special_tokens=True)
        for count in range(len(whole) - len(own) + 1):
            if [*whole[count : count + len(own)]] == [*own]:
                return tuple(whole[:count]), tuple(whole[count + len(own) :])
        return (), ()
