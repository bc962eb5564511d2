"""What is known of each part, and its file."""

import enum
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from steer_service.formats.atomic_write import atomic_write


class Outcome(enum.StrEnum):
    """How a part ended."""

    PASSED = "passed"
    FAILED = "failed"
    OVER_LIMIT = "ended at its time limit"
    NOT_ENDED = "begun, but not ended"
    NOT_RUN = "not run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A figure beside its target."""

    what: str
    figure: str
    target: str
    is_met: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What the log of a part says."""

    lines: tuple[str, ...] = ()
    """Lines of Markdown: a table, and sentences around it."""
    targets: tuple[Target, ...] = ()
    figures: Mapping[str, Any] | None = None
    """The same and more, for programs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartResult:
    """What is known of a part."""

    outcome: Outcome
    reason: str = ""
    """Why it was not run, or what went wrong."""
    began: str = ""
    """Date and time."""
    machine: str = ""
    """Device and versions."""
    command: str = ""
    seconds: float = 0.0
    limit_s: float = 0.0
    reading: Reading = Reading()
    last_lines: tuple[str, ...] = ()
    """The end of its log, unless it passed."""

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The result of which `asdict` made these fields."""
        read = fields["reading"]
        targets = tuple(Target(**target) for target in read["targets"])
        reading = Reading(lines=tuple(read["lines"]), targets=targets, figures=read["figures"])
        rest = {"outcome": Outcome(fields["outcome"]), "last_lines": tuple(fields["last_lines"])}
        return cls(**{**fields, **rest, "reading": reading})


def load(file: Path) -> dict[int, PartResult]:
    """Number of a part -> its result; empty if there is no such file."""
    if not file.exists():
        return {}
    return {int(number): PartResult.from_json(fields) for number, fields in json.loads(file.read_text()).items()}


def save(file: Path, results: Mapping[int, PartResult]) -> None:
    """Replaces the file."""
    with atomic_write(file) as part:
        part.write_text(json.dumps({number: asdict(result) for number, result in results.items()}, indent=2) + "\n")
