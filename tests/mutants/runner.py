"""Runs tests on a copy of the tree, with a mutant in it or without."""

import enum
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.mutant import Mutant

ROOT = Path(__file__).parents[2]

TEST_TIMEOUT_S = 300
"""Seconds after which pytest fails a test. The longest takes 90 s alone, and most far less."""

RUN_TIMEOUT_S = 1200
"""Seconds after which a run of pytest is given up."""


class Outcome(enum.StrEnum):
    """What became of one test."""

    PASSED = "passed"
    FAILED = "failed"
    BROKEN = "broken"
    """It did not run: it was not found, or was skipped, or its module or a fixture failed."""


class Verdict(enum.StrEnum):
    """What became of one mutant."""

    KILLED = "killed"
    """Every test that it names ran and failed."""
    SURVIVED = "SURVIVED"
    """A test that it names passed."""
    BROKEN = "broken"
    """A test that it names did not run, so nothing was learnt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The verdict on one mutant."""

    verdict: Verdict
    outcomes: dict[str, Outcome]
    """Node id of each named test -> its outcome."""
    took_s: float


@contextmanager
def copied_tree(root: Path = ROOT) -> Iterator[Path]:
    """A folder with the tracked files of `root`, as they are now, and a link to this interpreter's environment."""
    answer = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder) / "tree"
        for name in filter(None, answer.stdout.split("\0")):
            if os.path.lexists(root / name):  # it may have been deleted and not committed
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, tree / name, follow_symlinks=False)
        (tree / ".venv").symlink_to(sys.prefix)
        yield tree


def check_imports(tree: Path) -> None:
    """Raises AssertionError unless Python imports the packages from `tree`, in whatever folder it is started."""
    program = "import steer_client, steer_service; print(steer_client.__file__, steer_service.__file__)"
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd="/", env=_environment(tree), capture_output=True, text=True, check=True
    )
    assert all(Path(name).is_relative_to(tree) for name in answer.stdout.split()), answer.stdout


def judged(mutant: Mutant, clean: Path) -> Result:
    """The verdict on a mutant of the tree `clean`, which stays as it is."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(clean, tree, symlinks=True)
        (tree / mutant.file).write_text(mutant.applied_to((tree / mutant.file).read_text()))
        outcomes = outcomes_of(mutant.killed_by, tree)
    return Result(verdict=verdict_of(outcomes.values()), outcomes=outcomes, took_s=time.monotonic() - began)


def verdict_of(outcomes: Iterable[Outcome]) -> Verdict:
    """The verdict on a mutant, from the outcomes of all tests that it names."""
    found = set(outcomes)
    if Outcome.BROKEN in found:
        return Verdict.BROKEN
    return Verdict.KILLED if found == {Outcome.FAILED} else Verdict.SURVIVED


def outcomes_of(tests: Sequence[str], tree: Path) -> dict[str, Outcome]:
    """Runs tests of `tree`, by node ids without parameters; one fails if it fails for any of its parameters."""
    report = tree / "report.xml"
    command = [
        *(ROOT / ".ci" / "private-shm", sys.executable, "-m", "pytest", *tests, "-q", "--tb=no"),
        *("-p", "no:cacheprovider", f"--junitxml={report}", f"--timeout={TEST_TIMEOUT_S}", "--hypothesis-seed=0"),
    ]
    try:
        subprocess.run(
            command, cwd=tree, env=_environment(tree), capture_output=True, timeout=RUN_TIMEOUT_S, check=False
        )
        cases = list(ET.parse(report).iter("testcase"))
    except (subprocess.TimeoutExpired, FileNotFoundError):
        cases = []
    return {test: _outcome([_case_outcome(case) for case in cases if _is_of(case, test)]) for test in tests}


def _environment(tree: Path) -> dict[str, str]:
    # The environment has an editable install of another tree: PYTHONPATH comes before it.
    return {**os.environ, "PYTHONPATH": str(tree)}


def _is_of(case: ET.Element, test: str) -> bool:
    file, _, name = test.partition("::")
    is_there = case.get("classname") == file.removesuffix(".py").replace("/", ".")
    return is_there and case.get("name", "").partition("[")[0] == name


def _case_outcome(case: ET.Element) -> Outcome:
    if case.find("failure") is not None:
        return Outcome.FAILED
    error = case.find("error")
    if error is not None:  # the check for what a test leaves behind runs in its teardown
        return Outcome.FAILED if error.get("message", "").startswith("failed on teardown") else Outcome.BROKEN
    return Outcome.BROKEN if case.find("skipped") is not None else Outcome.PASSED


def _outcome(cases: Sequence[Outcome]) -> Outcome:
    for outcome in (Outcome.BROKEN, Outcome.FAILED):
        if outcome in cases:
            return outcome
    return Outcome.PASSED if cases else Outcome.BROKEN
