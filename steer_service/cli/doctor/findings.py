"""What a check found, in one line."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How serious a finding is."""

    OK = "ok"
    """Nothing to do."""
    WARN = "warn"
    """A server starts; the text says what will not work, or may not."""
    FAIL = "fail"
    """A server does not start, or not as it was configured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of `steer doctor`."""

    check: str
    """What was checked."""
    status: Status
    """How serious it is."""
    text: str
    """What was found and, unless it is fine, what to do."""


Check = Callable[[], Iterable[Finding]]
"""One subject; yields a finding for each thing that it looked at."""


def ok(check: str, text: str) -> Finding:
    """A finding without anything to do."""
    return Finding(check=check, status=Status.OK, text=text)


def warn(check: str, text: str) -> Finding:
    """A finding that does not keep a server from its start."""
    return Finding(check=check, status=Status.WARN, text=text)


def fail(check: str, text: str) -> Finding:
    """A finding that keeps a server from its start."""
    return Finding(check=check, status=Status.FAIL, text=text)


def findings_of(name: str, check: Check) -> list[Finding]:
    """What `check` finds; an unexpected error of its own is a finding and ends no other check."""
    found: list[Finding] = []
    try:
        found.extend(check())
    except Exception as error:
        text = one_line(f"the check itself failed, please report it: {type(error).__name__}: {error}")
        found.append(fail(name, text))
    return found


def one_line(text: str, most: int = 300) -> str:
    """`text` without line breaks, cut to `most` characters."""
    joined = " ".join(text.split())
    return joined if len(joined) <= most else joined[: most - 1] + "…"


def gib(size: int) -> str:
    """Bytes, for people."""
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.0f} MiB"
