"""How long commands say on standard error where they are: lines, a bar, a clock, a meter."""

import sys
import time
from collections.abc import Callable
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


class Meter:
    """Draws how many prompts are done, how fast tokens and bytes come, and how long it will go on."""

    def __init__(
        self,
        *,
        total: int | None,
        done: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._done = self._before = done
        self._failed = self._tokens = self._bytes = 0
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._every_s = 0.2 if self._is_terminal else 10.0
        self._clock = clock
        self._started = self._drawn = clock()

    def advance(self, *, tokens: int = 0, nbytes: int = 0, failed: bool = False) -> None:
        """Says that one more prompt is done, which had so many tokens and of which so many bytes came."""
        self._done += 1
        self._failed += failed
        self._tokens += tokens
        self._bytes += nbytes
        if self._clock() - self._drawn >= self._every_s:
            self.draw()

    def say(self, message: str) -> None:
        """Prints a line, above the meter where it has one of its own."""
        self._stream.write(f"{self._begin}steer: {message}\n")
        self._stream.flush()

    def draw(self) -> None:
        """Draws where it is now."""
        self._drawn = self._clock()
        self._stream.write(f"{self._begin}{self.line()}{'' if self._is_terminal else chr(10)}")
        self._stream.flush()

    def line(self) -> str:
        """What it shows now."""
        elapsed = max(self._clock() - self._started, 1e-9)
        parts = [
            f"{self._done:,}/{self._total:,} prompts" if self._total else format_count(self._done, "prompt"),
            f"{self._tokens / elapsed:,.0f} tokens/s",
            f"{format_bytes(self._bytes / elapsed)}/s",
        ]
        parts += [f"{self._failed:,} failed"] if self._failed else []
        if self._total and self._done > self._before:
            left = (self._total - self._done) * elapsed / (self._done - self._before)
            parts.append(f"{format_duration(left)} left")
        return f"  {self._bar()}{', '.join(parts)}"

    def _bar(self) -> str:
        if not self._total:
            return ""
        filled = round(min(1.0, self._done / self._total) * BAR_WIDTH)
        return f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] "

    @property
    def _begin(self) -> str:
        return "\r\x1b[K" if self._is_terminal else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._done > self._before:
            self.draw()
            self._stream.write("\n" if self._is_terminal else "")
            self._stream.flush()


def format_count(count: int, noun: str) -> str:
    """How many there are of something: 1 prompt, 2,000 prompts."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_bytes(count: float) -> str:
    """A number of bytes for a person: 3.4 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def format_duration(seconds: float) -> str:
    """A duration for a person: 1:02:03, or 2:03."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"
