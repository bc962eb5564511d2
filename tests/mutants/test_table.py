"""Every mutant can be put into the tree as it is now, and names tests that exist."""

import ast
from functools import cache

import pytest
import yaml

from tests.mutants.mutant import Mutant
from tests.mutants.runner import ROOT
from tests.mutants.table import MUTANTS


@cache
def names_in(file: str) -> frozenset[str]:
    kinds = ast.FunctionDef, ast.AsyncFunctionDef
    return frozenset(node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, kinds))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_one_place_of_its_file_and_compiles(mutant: Mutant) -> None:
    assert mutant.new != mutant.old
    text = mutant.applied_to((ROOT / mutant.file).read_text())
    if mutant.file.endswith(".yaml"):
        yaml.safe_load(text)
    else:
        compile(text, mutant.file, "exec")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_tests_that_kill_a_mutant_exist(mutant: Mutant) -> None:
    assert mutant.killed_by
    for test in mutant.killed_by:
        file, _, name = test.partition("::")
        assert name in names_in(file), test


def test_mutants_have_names_of_their_own() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("text", ["", "guard guard"])
def test_a_text_that_is_not_there_exactly_once_is_refused(text: str) -> None:
    mutant = Mutant(name="none", file="guard.py", old="guard", new="", why="", killed_by=())
    with pytest.raises(ValueError, match=r"none: the text to replace is [02] times"):
        mutant.applied_to(text)
