"""The text of an output, piece by piece, up to its stop string."""

from collections.abc import Sequence
from typing import Any

from steer_service.core.sampling_options import SamplingOptions

UNFINISHED = "�"
"""What a tokenizer decodes a character to whose last bytes are still missing."""


class TextStream:
    """Turns generated tokens into pieces of text; a piece is final."""

    def __init__(self, tokenizer: Any, options: SamplingOptions) -> None:
        self._tokenizer = tokenizer
        self._options = options
        self._sent = 0
        # The last characters may begin a stop string. They are sent when the next token shows that they do not.
        lengths = [len(stop) for stop in options.stop]
        self._held_back = max(lengths, default=1) - 1 if not options.include_stop else 0
        self.stop: str | None = None
        """The stop string that was found; None before."""

    def next(self, generated: Sequence[int], *, is_last: bool, may_stop: bool) -> str:
        """The text that the newest token adds.

        Sets `stop` and cuts the text there if `may_stop` and a stop string was generated. `is_last` also returns the
        characters that were kept back.
        """
        text = self._tokenizer.decode(generated, skip_special_tokens=self._options.skip_special_tokens)
        if may_stop:
            text = self._cut(text)
        end = len(text) if is_last or self.stop is not None else len(text) - self._held_back
        if not is_last and text.endswith(UNFINISHED):
            end = min(end, len(text.rstrip(UNFINISHED)))
        end = max(self._sent, end)
        piece, self._sent = text[self._sent : end], end
        return piece

    def _cut(self, text: str) -> str:
        found = [(text.find(stop, max(0, self._sent - len(stop))), stop) for stop in self._options.stop]
        found = sorted(pair for pair in found if pair[0] >= 0)
        if not found:
            return text
        at, self.stop = found[0]
        return text[: at + len(self.stop)] if self._options.include_stop else text[:at]
