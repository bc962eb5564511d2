"""Progress on standard error, on a terminal and elsewhere."""

import functools
import io
import sys

import pytest

from steer_service.cli.progress import LINE_EVERY_S, CaptureProgress, clock, format_bytes, print_message, token_bar

LONG_S = 5000.0
"""So long that the moments which a test itself takes change no digit of a rate."""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def replace_stderr(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


both_kinds = pytest.mark.parametrize("kind", [Terminal, io.StringIO], ids=["terminal", "file"])


def pass_time(progress: CaptureProgress, seconds: float) -> None:
    progress.bar.start_t -= seconds
    progress.bar.last_print_t -= seconds


def shown(stream: io.StringIO) -> list[str]:
    """The lines that a reader sees in the end."""
    return [functools.reduce(overwrite, line.split("\r")).rstrip() for line in stream.getvalue().split("\n")]


def overwrite(before: str, written: str) -> str:
    return written + before[len(written) :]


@both_kinds
def test_progress_shows_rates_failures_and_the_time_left(
    kind: type[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = replace_stderr(kind(), monkeypatch)
    with CaptureProgress(total=400, done=200) as progress:
        for _ in range(98):
            progress.advance(tokens=1000, nbytes=100_000_000)
        pass_time(progress, LONG_S)
        progress.advance(failed=True)
        progress.advance(tokens=1000, nbytes=100_000_000)

    [line] = [line for line in shown(stderr) if "300/400" in line]
    assert line.startswith("prompts: ")
    assert "20 tokens/s, 1.98MB/s, 1 failed" in line
    assert "[1:23:20<1:23:2" in line  # as long again, for as many prompts again
    assert ("|" in line) == stderr.isatty()


@both_kinds
def test_progress_without_a_total_has_no_bar(kind: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = replace_stderr(kind(), monkeypatch)
    with CaptureProgress(total=None) as progress:
        pass_time(progress, LONG_S)
        progress.advance(tokens=35_000, nbytes=2_560_000)

    line = shown(stderr)[0]
    assert "prompts: 1 prompt [1:23:20, " in line
    assert "7 tokens/s, 512B/s" in line
    assert "|" not in line


def test_progress_in_a_file_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    file = replace_stderr(io.StringIO(), monkeypatch)
    with CaptureProgress(total=100) as progress:
        for _ in range(10):
            progress.advance()
        assert file.getvalue() == ""

        pass_time(progress, LINE_EVERY_S)
        progress.advance()
        progress.advance()
        assert [line.split(" ")[1] for line in file.getvalue().splitlines()] == ["11/100"]

    assert [line.split(" ")[1] for line in file.getvalue().splitlines()] == ["11/100", "12/100"]


@both_kinds
def test_a_run_without_progress_leaves_no_line(kind: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = replace_stderr(kind(), monkeypatch)
    with CaptureProgress(total=100, done=30):
        pass

    assert shown(stderr) == [""]


@both_kinds
def test_a_message_does_not_tear_the_bar(kind: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = replace_stderr(kind(), monkeypatch)
    with CaptureProgress(total=100) as progress:
        progress.advance()
        print_message("hello")
        progress.advance()

    message, bar, end = shown(stderr)
    assert (message, end) == ("steer: hello", "")
    assert "2/100" in bar


def test_a_terminal_shows_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = replace_stderr(Terminal(), monkeypatch)
    with CaptureProgress(total=100) as progress:
        for _ in range(10):
            pass_time(progress, LINE_EVERY_S)
            progress.advance()
        assert stderr.getvalue().count("\r") > 10
        assert "\n" not in stderr.getvalue()

    assert stderr.getvalue().count("\n") == 1


def test_a_bar_of_tokens_in_a_file_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    file = replace_stderr(io.StringIO(), monkeypatch)
    with token_bar(100) as bar:
        for _ in range(100):
            bar.update(1)

    assert [line.split(" ")[1] for line in file.getvalue().splitlines()] == ["25/100", "50/100", "75/100", "100/100"]


def test_a_clock_in_a_file_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    file = replace_stderr(io.StringIO(), monkeypatch)
    with clock("loading") as shown_clock:
        for _ in range(10):
            shown_clock.update(0)
        assert file.getvalue() == "steer: loading, 00:00\n"
        shown_clock.start_t -= 75.5
        shown_clock.last_print_t -= 75.5
        shown_clock.update(0)

    assert file.getvalue() == "steer: loading, 00:00\nsteer: loading, 01:15\n"


def test_a_clock_on_a_terminal_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = replace_stderr(Terminal(), monkeypatch)
    with clock("loading"):
        pass

    assert shown(stderr) == ["steer: loading, 00:00", ""]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0.00B"), (999, "999B"), (1536, "1.54kB"), (2_500_000, "2.50MB"), (5 * 10**12, "5.00TB")],
)
def test_bytes_are_short(count: int, text: str) -> None:
    assert format_bytes(count) == text
