"""The text that generated tokens add to a prompt, token by token.

The text of an output is decode(prompt + generated) without decode(prompt), and without a character that began in the
prompt. What was returned never changes; a character is returned when its last byte is known.
"""

from collections.abc import Sequence

from steer_service.runtime.token_texts import TokenTexts

UNFINISHED = "\ufffd"
"""What bytes are decoded to that are no character, or not yet."""

CONTEXT = 8
"""Tokens of the prompt that are decoded with the first generated one, at least."""

MOST_UNFINISHED = 3
"""A character has at most four bytes, so at most three are unfinished."""

MOST_PENDING = 32
"""Tokens that may wait for a character to be finished. More cannot be one, so their bytes are no characters."""

KEPT_PENDING = 16
"""Tokens that are decoded again after that, enough to find the same characters at their end."""


class Detokenizer:
    """Turns the tokens of one output into text. The work for a token does not grow with their number."""

    def __init__(self, texts: TokenTexts, prompt: Sequence[int], *, skip_special: bool) -> None:
        self._texts = texts
        self._skip_special = skip_special
        # The window is what the next token is decoded with: tokens whose text is known, and pending ones.
        self._window = _context(texts, prompt, skip_special)
        # `open` is the number of U+FFFD at the prompt's end. The last one may become a character, or all of them one.
        self._known, self._open = self._prompt_text()
        self._pending = 0
        if not self._open and texts.is_concatenated:
            self._window, self._known = [], ""

    def push(self, token_id: int) -> str:
        """The text that is certain once this token is known; "" while a character is unfinished."""
        if not self._window and self._texts.is_concatenated:
            text = self._texts.of_token(token_id, skip_special=self._skip_special)
            if UNFINISHED not in text:
                return text
        elif self._is_silent(token_id):
            return ""
        self._window.append(token_id)
        self._pending += 1
        text = self._decode(self._window)
        if not self._ends_unfinished(text):
            ends_the_prompt, new = bool(self._open), self._new(text)
            if ends_the_prompt:
                self._forget(len(self._window))  # the pending tokens alone would begin within a character
            elif new or self._pending > MOST_PENDING:
                self._forget(self._pending)
            return new
        if self._pending > MOST_PENDING:
            new = self._new(text[:-MOST_UNFINISHED])
            self._window = self._window[-KEPT_PENDING:]
            self._known = self._decode(self._window)[:-MOST_UNFINISHED]
            self._pending = KEPT_PENDING
            return new
        return ""

    def finish(self) -> str:
        """The text of what is still unfinished: U+FFFD for a character that lacks its last bytes."""
        if not self._pending:
            return ""
        new = self._new(self._decode(self._window))
        self._forget(self._pending)
        return new

    def _prompt_text(self) -> tuple[str, int]:
        """The text of the prompt's last tokens, and the number of U+FFFD after it."""
        text = self._decode(self._window)
        if not self._ends_unfinished(text):
            return text, 0
        known = text.rstrip(UNFINISHED)
        if not self._texts.is_concatenated:
            # An unfinished character may make the ones before it U+FFFD as well, until it is finished.
            for count in range(1, MOST_UNFINISHED + 1):
                before = self._decode(self._window[:-count])
                if not before.endswith(UNFINISHED) and len(before) >= len(known):
                    return before, count
        return known, len(text) - len(known)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._texts.decode(token_ids, skip_special=self._skip_special)

    def _ends_unfinished(self, text: str) -> bool:
        """True if `text`, of the window, may end within a character."""
        if not text.endswith(UNFINISHED):
            return False
        visible = (token for token in reversed(self._window) if not self._is_silent(token))
        return self._texts.has_bytes(next(visible))

    def _is_silent(self, token_id: int) -> bool:
        return self._texts.is_silent(token_id, skip_special=self._skip_special)

    def _new(self, text: str) -> str:
        """What `text`, of the window, adds to what is known of it."""
        if not text.startswith(self._known):  # bytes that are no characters can change the ones before them
            self._open = 0
            return self._decode(self._window[-self._pending :])
        new = text[len(self._known) :]
        if self._open:
            missing = min(len(new) - len(new.lstrip(UNFINISHED)), self._open)
            new = new[missing + (missing < self._open) :]  # the last of them may have become a character
            self._open = 0
        return new

    def _forget(self, kept: int) -> None:
        """Keeps only the last tokens, whose text is now known, as context of the next."""
        self._window = self._window[-kept:] if not self._texts.is_concatenated else []
        self._known = self._decode(self._window) if self._window else ""
        self._pending = 0


def _context(texts: TokenTexts, prompt: Sequence[int], skip_special: bool) -> list[int]:
    """The last tokens of the prompt, beginning with a whole character."""
    count = CONTEXT
    while True:
        window = list(prompt[-count:])
        text = texts.decode(window, skip_special=skip_special)
        if count >= len(prompt) or (text and not text.startswith(UNFINISHED)):
            return window
        count *= 2
