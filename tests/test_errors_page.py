"""docs/errors.md and errors.proto list every reason that the source can raise, under its code on the wire."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from steer_service.core import errors
from steer_service.core.errors import SteerError
from steer_service.wire import status_codes
from steer_service.wire.status_codes import status_from_error

ROOT = Path(__file__).parents[1]
PAGE, CONTRACT = ROOT / "docs" / "errors.md", ROOT / "proto" / "steer" / "v1" / "errors.proto"
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


def retried_reasons() -> set[str]:
    """The reasons that the source raises with a delay after which a retry may help."""
    found: set[str] = set()
    for path in source_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and (kind := KINDS.get(ast.unparse(node.func))):
                words = {word.arg: word.value for word in node.keywords}
                if "retry_after_s" in words:
                    found |= set(texts_in(words["reason"])) if "reason" in words else {kind.default_reason}
    return found


@dataclass(frozen=True)
class Entry:
    """What is written about one reason."""

    heading: str
    meaning: str
    retry: str = ""

    @property
    def on_the_wire(self) -> bool:
        """It stands under a code."""
        return self.heading.isupper()


def entries_of_the_page() -> dict[str, Entry]:
    """Reason in docs/errors.md -> its row."""
    entries, heading = {}, ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("#"):
            heading = line.strip("# ")
        elif line.startswith("| `"):
            names, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
            entries |= dict.fromkeys(re.findall(r"`([A-Z][A-Z_]*[A-Z])`", names), Entry(heading, *cells))
    return entries


def entries_of_the_contract() -> dict[str, Entry]:
    """Reason in errors.proto -> its entry."""
    lines = [line.removeprefix("//").strip() for line in CONTRACT.read_text().splitlines() if line.startswith("//")]
    entries = {}
    for section in "\n".join(lines).split("\n# ")[1:]:
        code = re.match(r"([A-Z_]+) \((\d+)\)\n", section)
        if code is None:
            continue
        assert grpc.StatusCode[code[1]].value[0] == int(code[2])
        for item in section.split("\n- ")[1:]:
            names, text = " ".join(item.split("\n\n")[0].split()).split(": ", 1)
            meaning, _, retry = text.removesuffix(".").partition(". Retry: ")
            entries |= dict.fromkeys(names.split(", "), Entry(code[1], meaning, retry))
    return entries


RAISED, PAGE_ENTRIES = raised_reasons(), entries_of_the_page()
LISTED = {reason: entry.heading for reason, entry in PAGE_ENTRIES.items()}


def test_the_page_lists_every_reason_and_no_other() -> None:
    assert len(RAISED) > 100
    assert set(LISTED) - set(RAISED) == set()
    assert set(RAISED) - set(LISTED) == set()


def test_the_contract_says_of_every_reason_on_the_wire_what_the_page_says() -> None:
    assert entries_of_the_contract() == {reason: entry for reason, entry in PAGE_ENTRIES.items() if entry.on_the_wire}


def test_what_may_be_retried_has_a_delay_in_both_lists() -> None:
    told = {reason for reason, entry in PAGE_ENTRIES.items() if entry.retry not in ("", "no")}
    assert told == retried_reasons() | {"UNREACHABLE"}  # from gRPC itself, so without a delay


@pytest.mark.parametrize(
    ("reason", "file"),
    [
        ("QUEUE_FULL", "runtime/worker_threads.py"),
        ("QUEUE_FULL", "engine/constraints.py"),
        ("SHM_SPACE", "shm/pool.py"),
        ("SHM_SPACE", "shm/segments.py"),
        ("TOO_MANY_CHALLENGES", "server/shared_memory_sessions.py"),
    ],
)
def test_the_page_has_the_delays_of_the_source(reason: str, file: str) -> None:
    source = (ROOT / "steer_service" / file).read_text()  # not imported: one of them needs vLLM
    (seconds,) = re.findall(r"^RETRY_AFTER_S = ([\d.]+)$", source, re.MULTILINE)
    assert f"{float(seconds):g} s" in PAGE_ENTRIES[reason].retry


@pytest.mark.parametrize("reason", [reason for reason in RAISED if LISTED.get(reason, "").isupper()])
def test_a_reason_stands_under_the_code_that_it_has(reason: str) -> None:
    kinds = [KINDS[name] for name in RAISED[reason] if name in KINDS]
    assert {status_from_error(kind("wrong", reason=reason)).code.name for kind in kinds} <= {LISTED[reason]}
