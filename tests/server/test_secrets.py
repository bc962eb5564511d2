"""Secrets are compared with `hmac.compare_digest`: `==` takes longer the more of a guess is right.

No test can measure that reliably, so this one reads the source.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import steer_service.server

FILES = sorted(Path(steer_service.server.__file__).parent.glob("*.py"))
SECRET = re.compile(r"(^|_)(nonce|token|signature|secret|password|salt)$")
"""Names of what a client must know, and nobody may guess."""


def names_in(operand: ast.expr) -> Iterator[str]:
    """The names whose values an operand compares: those of its elements, of a part of it, of what a call returns."""
    match operand:
        case ast.Name():
            yield operand.id
        case ast.Attribute():
            yield operand.attr
        case ast.Call(func=inner) | ast.Subscript(value=inner) | ast.Starred(value=inner):
            yield from names_in(inner)
        case ast.Tuple() | ast.List() | ast.Set():
            for element in operand.elts:
                yield from names_in(element)


def comparisons_of_secrets(source: str) -> list[str]:
    """The comparisons of two values of which one is a secret, with `==`, `!=` or `in` a row of values."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Compare):
            continue
        operands = [node.left, *node.comparators]
        for operator, left, right in zip(node.ops, operands, operands[1:], strict=False):
            compares = isinstance(operator, (ast.Eq, ast.NotEq)) or isinstance(right, (ast.Tuple, ast.List, ast.Set))
            lefts, rights = list(names_in(left)), list(names_in(right))
            if compares and lefts and rights and any(map(SECRET.search, [*lefts, *rights])):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "line",
    [
        "challenge.nonce != nonce",
        "token[16:] == self._signature(last_use, owner)",
        "(one.release_token, one.owner) == (release_token, owner)",
        "cancel_token in (one.cancel_token, other)",
        "token in [*known]",
    ],
)
def test_a_comparison_that_takes_longer_for_a_better_guess_is_found(line: str) -> None:
    assert comparisons_of_secrets(line) == [ast.unparse(ast.parse(line))]


@pytest.mark.parametrize(
    "line",
    ["token == ''", "not token", "token in self._by_token", "token is None", "tokens == length", "owner != other"],
)
def test_other_comparisons_are_not_found(line: str) -> None:
    assert comparisons_of_secrets(line) == []


def test_the_server_compares_no_secret_in_a_time_that_depends_on_it() -> None:
    found = {path.name: comparisons_of_secrets(path.read_text()) for path in FILES}
    assert len(found) > 20
    assert {name: lines for name, lines in found.items() if lines} == {}
