"""Messages and progress on standard error: a bar of tqdm on a terminal, a line now and then elsewhere."""

import math
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from steer_service.cli.terminal import shown

LINE_EVERY_S = 10.0
"""Seconds between two lines of a bar that is not on a terminal."""
LINES_PER_BAR = 4
"""Lines of a bar that counts to a known total and is not on a terminal."""
SHORTEST_DELAY_S = 1e-9
"""With any delay, tqdm does not draw a bar of which nothing is done yet."""
LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
"""What such a line shows, in tqdm's fields."""


def print_message(message: str) -> None:
    """Prints a line, above the bar if there is one."""
    tqdm.write(shown(f"steer: {message}", sys.stderr), file=sys.stderr)


def token_bar(total: int) -> tqdm:
    """A bar that counts tokens up to `total`; its lines come at equal shares of the total."""
    lines = {"miniters": total / LINES_PER_BAR, "mininterval": 0.0, "maxinterval": math.inf, "delay": SHORTEST_DELAY_S}
    return _bar(lines, total=total, desc="tokens", unit=" token")


def clock(message: str) -> tqdm:
    """Shows how long something of unknown length takes. Call `update(0)` several times a second."""
    return _bar({"mininterval": LINE_EVERY_S}, desc=f"steer: {message}", bar_format="{desc}, {elapsed}", miniters=0)


class CaptureProgress:
    """Shows how many prompts are done, how fast tokens and bytes come, how many prompts failed and the time left."""

    def __init__(self, *, total: int | None, done: int = 0) -> None:
        """`done` prompts of `total` were done by earlier runs; None if the total is not known."""
        self._tokens = self._bytes = self._failed = 0
        # Without smoothing the rate is that of the whole run. Prompts differ in length, so the last few mean little.
        self.bar = _bar(
            {"mininterval": LINE_EVERY_S, "delay": LINE_EVERY_S, "miniters": 1},
            total=total,
            initial=done,
            desc="prompts",
            unit=" prompt",
            smoothing=0,
        )
        """The bar itself."""

    def advance(self, *, tokens: int = 0, nbytes: int = 0, failed: bool = False) -> None:
        """Counts one more prompt, its tokens and the bytes that were captured."""
        self._tokens += tokens
        self._bytes += nbytes
        self._failed += failed
        self.bar.set_postfix_str(self._postfix(), refresh=False)
        self.bar.update()

    def _postfix(self) -> str:
        elapsed_s = max(self.bar.format_dict["elapsed"], 1e-9)
        rates = f"{self._tokens / elapsed_s:,.0f} tokens/s, {format_bytes(self._bytes / elapsed_s)}/s"
        return f"{rates}, {self._failed:,} failed" if self._failed else rates

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar.n > self.bar.initial:
            self.bar.refresh()
        else:
            self.bar.leave = False
        self.bar.close()


def format_count(count: int, noun: str) -> str:
    """How many there are of something: 1 prompt, 2,000 prompts."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_bytes(count: float) -> str:
    """A number of bytes for a person, in powers of 1000: 3.40MB."""
    return tqdm.format_sizeof(count, "B")


class _Lines:
    """A file for tqdm that turns each drawing of a bar into a line of standard error."""

    def write(self, text: str) -> None:
        line = text.strip()
        if line:
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def _bar(lines: Mapping[str, Any], *, bar_format: str | None = None, **options: Any) -> tqdm:
    """A bar of tqdm with `options`; if standard error is no terminal, lines, with the options in `lines` as well."""
    if sys.stderr.isatty():
        return tqdm(**options, bar_format=bar_format, dynamic_ncols=True)
    if options.get("total") is not None:  # without a total, the format of tqdm has no bar
        bar_format = bar_format or LINE
    return tqdm(**options, **lines, bar_format=bar_format, file=_Lines(), leave=False)
