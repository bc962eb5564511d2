"""How long commands say on standard error where they are: lines, a bar, a clock."""

import sys
import time
from types import TracebackType
from typing import Self, TextIO

BAR_WIDTH = 30
LINE_EVERY = 0.25
"""Share of the whole after which a bar that is no terminal prints a line."""


def say(message: str) -> None:
    """Prints a line."""
    print(f"steer: {message}", file=sys.stderr, flush=True)


class Bar:
    """Draws how much of a known amount is done; where there is no terminal, a line now and then."""

    def __init__(self, unit: str, *, total: int, stream: TextIO | None = None) -> None:
        self._unit = unit
        self._total = total
        self._done = 0
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._next_line = LINE_EVERY
        self._started = time.monotonic()

    def advance(self, count: int) -> None:
        """Says that `count` more are done."""
        self._done += count
        if self._is_terminal:
            self._stream.write("\r" + self._line())
        elif self._done >= self._next_line * self._total:
            self._stream.write(self._line() + "\n")
            self._next_line = self._done / self._total + LINE_EVERY
        self._stream.flush()

    def _line(self) -> str:
        share = min(1.0, self._done / self._total)
        filled = round(share * BAR_WIDTH)
        elapsed = time.monotonic() - self._started
        return (
            f"  [{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {self._done}/{self._total} {self._unit}, {elapsed:.1f} s"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_terminal:
            self._stream.write("\n")
            self._stream.flush()


class Clock:
    """Shows for how long something of unknown length has been going on."""

    def __init__(self, message: str, *, line_every_s: float = 10.0, stream: TextIO | None = None) -> None:
        self._message = message
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._line_every_s = line_every_s
        self._started = time.monotonic()
        self._next_line_s = 0.0

    def tick(self) -> None:
        """Draws the time; call it several times a second."""
        elapsed = time.monotonic() - self._started
        if self._is_terminal:
            self._stream.write(f"\rsteer: {self._message}, {elapsed:.0f} s ")
        elif elapsed >= self._next_line_s:
            self._stream.write(f"steer: {self._message}, {elapsed:.0f} s\n")
            self._next_line_s += self._line_every_s
        self._stream.flush()

    def __enter__(self) -> Self:
        self.tick()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_terminal:
            self._stream.write("\n")
            self._stream.flush()
