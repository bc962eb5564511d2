"""docs/errors.md lists every reason that the source can raise, under the code that it has on the wire."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from steer_service.core import errors
from steer_service.core.errors import SteerError
from steer_service.wire import status_codes
from steer_service.wire.status_codes import status_from_error

ROOT = Path(__file__).parents[1]
REASON = re.compile(r"[A-Z][A-Z_]*[A-Z]")
KINDS = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, SteerError)}


def source_files() -> list[Path]:
    """The modules of the project that are written by hand."""
    files = [path for top in ("steer_service", "steer_client") for path in (ROOT / top).rglob("*.py")]
    return [path for path in files if not re.search(r"_pb2(_grpc)?\.py$", path.name)]


def texts_in(node: ast.AST) -> Iterator[str]:
    """The reasons among the constants under a node."""
    constants = (part.value for part in ast.walk(node) if isinstance(part, ast.Constant))
    return (value for value in constants if isinstance(value, str) and REASON.fullmatch(value))


def raised_reasons() -> dict[str, set[str]]:
    """Reason -> names of the classes or functions that it is given to, "" where that is not a call."""
    found: dict[str, set[str]] = {}
    for path in source_files():
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=function, keywords=keywords):
                    given = [(ast.unparse(function), word.value) for word in keywords if word.arg == "reason"]
                    if ast.unparse(function) == "_other_model":  # its last argument is the reason
                        given = [("InvalidRequest", node.args[-1])]
                case ast.Assign(targets=[ast.Name(id="default_reason" | "reason")], value=value):
                    given = [("", value)]
                case _:
                    continue
            for name, value in given:
                for reason in texts_in(value):
                    found.setdefault(reason, set()).add(name)
    for _, reason, _ in status_codes._NOT_OURS.values():
        found.setdefault(reason, set()).add("")
    return found


def listed_reasons() -> dict[str, str]:
    """Reason on the page -> the heading above it."""
    listed, heading = {}, ""
    for line in (ROOT / "docs" / "errors.md").read_text().splitlines():
        if line.startswith("#"):
            heading = line.strip("# ")
        elif line.startswith("| `"):
            cell = line.split("|")[1]
            listed |= dict.fromkeys(re.findall(r"`([A-Z][A-Z_]*[A-Z])`", cell), heading)
    return listed


RAISED, LISTED = raised_reasons(), listed_reasons()


def test_the_page_lists_every_reason_and_no_other() -> None:
    assert len(RAISED) > 100
    assert set(LISTED) - set(RAISED) == set()
    assert set(RAISED) - set(LISTED) == set()


@pytest.mark.parametrize("reason", [reason for reason in RAISED if LISTED.get(reason, "").isupper()])
def test_a_reason_stands_under_the_code_that_it_has(reason: str) -> None:
    kinds = [KINDS[name] for name in RAISED[reason] if name in KINDS]
    assert {status_from_error(kind("wrong", reason=reason)).code.name for kind in kinds} <= {LISTED[reason]}
