"""The text of an output, piece by piece, and where a stop string ends it."""

from collections.abc import Sequence
from typing import Any

from steer_service.core.sampling_options import SamplingOptions

UNFINISHED = "�"
"""What a tokenizer makes of a character whose last bytes have not come yet."""


class TextStream:
    """Turns generated tokens into text that is never taken back."""

    def __init__(self, tokenizer: Any, options: SamplingOptions) -> None:
        self._tokenizer = tokenizer
        self._options = options
        self._sent = 0
        # What may be the beginning of a stop string is not sent before it turns out to be none.
        lengths = [len(stop) for stop in options.stop]
        self._held_back = max(lengths, default=1) - 1 if not options.include_stop else 0
        self.stop: str | None = None
        """The stop string that has come."""

    def next(self, generated: Sequence[int], *, is_last: bool, may_stop: bool) -> str:
        """What the newest token adds; finds a stop string if there `may_stop` be one yet."""
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
