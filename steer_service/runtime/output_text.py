"""The text of an output, piece by piece, up to its stop string."""

from collections.abc import Sequence
from typing import NamedTuple

from steer_service.core.sampling_options import SamplingOptions
from steer_service.runtime.detokenizer import Detokenizer
from steer_service.runtime.token_texts import TokenTexts


class NewText(NamedTuple):
    """What some new tokens add to an output."""

    text: str
    """Text that is final; without what may begin a stop string."""
    token_count: int
    """How many of the new tokens belong to the output: those after a stop string do not."""


class OutputText:
    """Turns the generated tokens of one output into text, and finds its stop string in that text alone."""

    def __init__(self, texts: TokenTexts, prompt: Sequence[int], options: SamplingOptions) -> None:
        """`options`: with defaults filled in."""
        assert options.min_tokens is not None
        self._detokenizer = Detokenizer(texts, prompt, skip_special=options.skip_special_tokens is not False)
        self._stops = options.stop
        self._includes_stop = bool(options.include_stop)
        self._min_tokens = options.min_tokens
        self._count = 0
        self._tail = ""  # the last characters, in which a stop string may have begun; not sent unless it is included
        self._tail_length = max(map(len, options.stop), default=1) - 1
        self.stop: str | None = None
        """The stop string that was found; None before."""

    def add(self, token_ids: Sequence[int], *, is_over: bool = False, ends_with_stop: bool = False) -> NewText:
        """The text of new tokens. Sets `stop` if a stop string ends in the text of a token after `min_tokens`.

        `is_over`: no token follows. `ends_with_stop`: the last one is a stop token, whose text is left out unless
        stops are included. Must not be called again after `stop` is set.
        """
        pieces = []
        for number, token_id in enumerate(token_ids, 1):
            is_stop_token = ends_with_stop and number == len(token_ids)
            self._count += 1
            text = "" if is_stop_token and not self._includes_stop else self._detokenizer.push(token_id)
            pieces.append(self._up_to_stop(text, may_stop=not is_stop_token) if self._stops else text)
            if self.stop is not None:
                return NewText("".join(pieces), number)
        if is_over:
            text = self._detokenizer.finish()
            pieces.append(self._up_to_stop(text, may_stop=not ends_with_stop) if self._stops else text)
            if self.stop is None and not self._includes_stop:
                pieces.append(self._tail)
        return NewText("".join(pieces), len(token_ids))

    def _up_to_stop(self, new: str, *, may_stop: bool) -> str:
        """What of `new` and the text before it can be sent."""
        text, seen = self._tail + new, len(self._tail)
        sent = seen if self._includes_stop else 0
        found = self._find(text, seen) if may_stop and new and self._count > self._min_tokens else None
        if found is not None:
            start, self.stop = found
            return text[sent : start + len(self.stop) if self._includes_stop else start]
        self._tail = text[-self._tail_length :] if self._tail_length else ""
        return text[sent:] if self._includes_stop else text[: len(text) - len(self._tail)]

    def _find(self, text: str, seen: int) -> tuple[int, str] | None:
        """Start and text of the stop string that ends first among those that end after `seen` characters."""
        best: tuple[int, str] | None = None
        for stop in self._stops:
            start = text.find(stop, max(0, seen - len(stop) + 1))
            if start >= 0 and (best is None or start + len(stop) < best[0] + len(best[1])):
                best = start, stop
        return best
