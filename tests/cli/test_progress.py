"""What the meter shows."""

import io

import pytest

from steer_service.cli.progress import Meter, format_bytes, format_duration


class Watch:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_it_says_how_fast_and_for_how_long() -> None:
    watch = Watch()
    meter = Meter(total=1000, done=200, stream=io.StringIO(), clock=watch)
    for _ in range(99):
        meter.advance(tokens=10, nbytes=1 << 20)
    meter.advance(failed=True)
    watch.now = 50.0

    assert meter.line() == (
        "  [#########.....................] 300/1,000 prompts, 20 tokens/s, 1.98 MiB/s, 1 failed, 5:50 left"
    )


def test_without_a_total_there_is_no_bar() -> None:
    watch = Watch()
    meter = Meter(total=None, stream=io.StringIO(), clock=watch)
    meter.advance(tokens=7, nbytes=512)
    watch.now = 1.0

    assert meter.line() == "  1 prompt, 7 tokens/s, 512 B/s"


def test_a_terminal_has_one_line_and_a_file_one_now_and_then() -> None:
    for stream, begin, end in ((Terminal(), "\r\x1b[K", ""), (io.StringIO(), "", "\n")):
        watch = Watch()
        meter = Meter(total=100, stream=stream, clock=watch)
        for _ in range(10):
            meter.advance()
        assert stream.getvalue() == ""
        watch.now = 10.0
        meter.advance()
        meter.say("hello")
        assert stream.getvalue() == f"{begin}{meter.line()}{end}{begin}steer: hello\n"


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 20, "1 MiB"), (5 << 40, "5,120.0 GiB")]
)
def test_bytes_are_said_briefly(count: int, said: str) -> None:
    assert format_bytes(count) == said


def test_times_are_said_briefly() -> None:
    assert [format_duration(seconds) for seconds in (0, 59.6, 3599, 3661)] == ["0:00", "1:00", "59:59", "1:01:01"]
