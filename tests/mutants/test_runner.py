"""The runner says what became of a mutant: on a tree of two small files, and on this one."""

from pathlib import Path

import pytest

from tests.mutants.mutant import Mutant
from tests.mutants.runner import Outcome, Verdict, check_imports, copied_tree, judged, outcomes_of, verdict_of

GUARD = """\
def is_allowed(owner: str, asker: str) -> bool:
    return owner == asker  # nobody else
"""
TESTS = """\
import pytest
from guard import is_allowed

@pytest.mark.parametrize("asker", ["alice", "bob"])
def test_others_are_refused(asker):
    assert is_allowed("alice", asker) == (asker == "alice")

def test_owners_are_allowed():
    assert is_allowed("alice", "alice")

@pytest.mark.skip
def test_that_is_skipped():
    pass

@pytest.fixture
def broken():
    raise ValueError

def test_that_cannot_begin(broken):
    pass

@pytest.fixture
def checked():
    yield
    raise ValueError

def test_that_leaves_something(checked):
    pass
"""
REFUSED = "test_guard.py::test_others_are_refused"
ALLOWED = "test_guard.py::test_owners_are_allowed"
SKIPPED = "test_guard.py::test_that_is_skipped"
CANNOT_BEGIN = "test_guard.py::test_that_cannot_begin"
LEAVES_SOMETHING = "test_guard.py::test_that_leaves_something"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "guard.py").write_text(GUARD)
    (folder / "test_guard.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    return folder


def mutant(old: str, new: str, *killed_by: str) -> Mutant:
    return Mutant(name="a mutant", file="guard.py", old=old, new=new, why="", killed_by=killed_by)


def test_a_mutant_is_killed_by_a_test_that_fails_for_one_of_its_parameters(tree: Path) -> None:
    result = judged(mutant("owner == asker", "True", REFUSED), tree)

    assert (result.verdict, result.outcomes) == (Verdict.KILLED, {REFUSED: Outcome.FAILED})
    assert (tree / "guard.py").read_text() == GUARD


def test_a_mutant_that_changes_nothing_survives(tree: Path) -> None:
    result = judged(mutant("# nobody else", "# no one else", REFUSED, ALLOWED), tree)

    assert (result.verdict, set(result.outcomes.values())) == (Verdict.SURVIVED, {Outcome.PASSED})


@pytest.mark.extended
def test_a_mutant_that_cannot_be_imported_is_not_killed(tree: Path) -> None:
    assert judged(mutant("def is_allowed", "def may", REFUSED), tree).verdict is Verdict.BROKEN


@pytest.mark.extended
def test_a_test_that_does_not_run_tells_nothing(tree: Path) -> None:
    assert outcomes_of([SKIPPED, CANNOT_BEGIN, LEAVES_SOMETHING], tree) == {
        SKIPPED: Outcome.BROKEN,
        CANNOT_BEGIN: Outcome.BROKEN,
        LEAVES_SOMETHING: Outcome.FAILED,
    }


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ([Outcome.FAILED, Outcome.FAILED], Verdict.KILLED),
        ([Outcome.FAILED, Outcome.PASSED], Verdict.SURVIVED),
        ([Outcome.FAILED, Outcome.BROKEN], Verdict.BROKEN),
        ([], Verdict.SURVIVED),
    ],
)
def test_every_test_that_a_mutant_names_must_run_and_fail(outcomes: list[Outcome], verdict: Verdict) -> None:
    assert verdict_of(outcomes) is verdict


def test_a_copy_of_this_tree_is_what_its_tests_import() -> None:
    with copied_tree() as tree:
        check_imports(tree)
        assert (tree / "pyproject.toml").is_file()
        assert (tree / "steer_service" / "proto").is_symlink()
