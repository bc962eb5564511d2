"""The source of one version of vLLM, and the register of what this project relies on in it.

Nothing of vLLM is imported. A check returns a few words on what it found, where versions differ, or raises Moved with a
plain sentence.
"""

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ENGINE = Path(__file__).parents[3] / "steer_service" / "engine"

VERSIONS = ("0.24.0", "0.32.0", "0.33.0")
"""Versions for which a check was run: both ends of the supported range, and the one that the tests run on."""


class Moved(Exception):
    """A seam is not where it was."""


@dataclass(frozen=True)
class Source:
    """The source of one version of vLLM."""

    folder: Path
    """The folder of the package `vllm`."""

    @property
    def version(self) -> str:
        """As its `_version.py` says, or the name of the folder above."""
        path = self.folder / "_version.py"
        found = re.search(r"^__version__\b.*?['\"]([0-9][^'\"]*)", path.read_text(), re.M) if path.exists() else None
        return found[1] if found else self.folder.parent.name

    @cache  # noqa: B019 - a handful of sources live as long as the process
    def tree(self, path: str) -> ast.Module:
        """One file's syntax tree."""
        file = self.folder / path
        if not file.exists():
            raise Moved(f"there is no file {path}")
        return ast.parse(file.read_text())

    def find(self, path: str, name: str) -> ast.AST:
        """A class, function or method, by its dotted name."""
        node: ast.AST = self.tree(path)
        for part in name.split("."):
            node = _child(node, part) or _moved(f"{path} has no {name}")
        return node

    def has(self, path: str, name: str) -> bool:
        """True if `find` would find it."""
        try:
            self.find(path, name)
        except Moved:
            return False
        return True

    def parameters(self, path: str, name: str) -> list[str]:
        """Names of a function's parameters, positional ones first."""
        node = self.find(path, name)
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        return [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]

    def fields(self, path: str, name: str) -> set[str]:
        """Annotated fields of a class's own body."""
        node = self.find(path, name)
        assert isinstance(node, ast.ClassDef)
        return {part.target.id for part in node.body if isinstance(part, ast.AnnAssign) and _is_name(part.target)}

    def bases(self, path: str, name: str) -> set[str]:
        """Names of a class's bases."""
        node = self.find(path, name)
        assert isinstance(node, ast.ClassDef)
        return {ast.unparse(base) for base in node.bases}

    def code(self, path: str, name: str) -> str:
        """The code without comments and layout: strings in single quotes, one statement a line."""
        return ast.unparse(self.find(path, name))


@dataclass(frozen=True)
class Seam:
    """One thing relied on."""

    name: str
    """What moves if it moves."""
    used_by: str
    """File of steer_service that relies on it."""
    check: Callable[[Source], str | None] = field(repr=False)
    """Raises Moved, or returns what is worth knowing of this version."""
    verified: tuple[str, ...] = VERSIONS
    """Versions in which it was found as it is used."""


SEAMS: list[Seam] = []


def seam(name: str, used_by: str, verified: tuple[str, ...] = VERSIONS) -> Callable:
    """Registers a check under the name of what it looks at."""

    def register(check: Callable[[Source], str | None]) -> Callable[[Source], str | None]:
        SEAMS.append(Seam(name, used_by, check, verified))
        return check

    return register


def _child(node: ast.AST, name: str) -> ast.AST | None:
    for part in ast.walk(node) if isinstance(node, ast.Module) else getattr(node, "body", ()):
        if isinstance(part, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and part.name == name:
            return part
    return None


def _is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name)


def _moved(sentence: str) -> ast.AST:
    raise Moved(sentence)


def require(condition: object, sentence: str) -> None:
    if not condition:
        raise Moved(sentence)


def require_order(code: str, where: str, *parts: str) -> None:
    """The parts occur, each after the one before."""
    at = -1
    for part in parts:
        found = code.find(part, at + 1)
        require(found >= 0, f"{where} no longer has {' then '.join(parts)}: {part} is not there or comes earlier")
        at = found


def require_fields(source: Source, path: str, name: str, wanted: set[str]) -> None:
    missing = wanted - source.fields(path, name)
    require(not missing, f"{name} has no {', '.join(sorted(missing))}")


def require_parameters(source: Source, path: str, name: str, wanted: list[str]) -> None:
    found = source.parameters(path, name)[: len(wanted)]
    require(found == wanted, f"{name} takes {', '.join(found)} and not {', '.join(wanted)}")


ARGUMENTS = "engine/arg_utils.py"
GPU_WORKER = "v1/worker/gpu_worker.py"
V1_RUNNER = "v1/worker/gpu_model_runner.py"
V2_RUNNER = "v1/worker/gpu/model_runner.py"
CPU_RUNNER = "v1/worker/cpu_model_runner.py"
ASYNC_LLM = "v1/engine/async_llm.py"
KV_MANAGER = "v1/core/kv_cache_manager.py"
KV_COORDINATOR = "v1/core/kv_cache_coordinator.py"
OUTPUT = "v1/core/sched/output.py"


def results(source: Source) -> list[tuple[Seam, bool, str]]:
    """Every seam with whether it is in place, and what there is to say."""
    answers = []
    for one in SEAMS:
        try:
            answers.append((one, True, one.check(source) or ""))
        except Moved as moved:
            answers.append((one, False, str(moved)))
    return answers
