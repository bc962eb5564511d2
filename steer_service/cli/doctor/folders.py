"""Folders that a server writes to. In a pod, the root file system is often read-only."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from steer_service.cli.doctor.findings import Finding, Status, ok

MOUNT = "mount a writable volume there, such as an emptyDir"


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """A folder that should be writable, or several of which one is enough."""

    variable: str
    """The environment variable that names it."""
    paths: tuple[Path, ...]
    """Where it is; the first that is writable is used."""
    purpose: str
    """What it is for."""
    severity: Status
    """How serious it is if none is writable."""


def check_folders(folders: tuple[Folder, ...]) -> Iterator[Finding]:
    """Whether each folder can be written to, or created."""
    for folder in folders:
        problems = [(path, why_not_writable(path)) for path in folder.paths]
        usable = next((path for path, problem in problems if not problem), None)
        if usable is not None:
            yield ok(folder.variable, f"{usable} is writable ({folder.purpose})")
            continue
        found = " and ".join(f"{path} is not writable ({problem})" for path, problem in problems)
        yield Finding(
            check=folder.variable,
            status=folder.severity,
            text=f"{found}, for {folder.purpose}; {MOUNT}, or set {folder.variable} to a writable folder",
        )


def folders_of(environment: Mapping[str, str], bundled: Status, compiled: Status) -> tuple[Folder, ...]:
    """The folders of a server with these environment variables.

    How serious it is if these cannot be written to: `bundled` for the folder of the bundled model, `compiled` for what
    vLLM compiles, without which it ends (`--enforce-eager` compiles nothing).
    """
    home = Path(environment.get("HOME") or os.path.expanduser("~"))
    cache = Path(environment.get("XDG_CACHE_HOME") or home / ".cache")
    temporary = Path(environment.get("TMPDIR") or "/tmp")
    source = Path(__file__).parents[2] / "ops" / "__pycache__"
    own_numba = environment.get("NUMBA_CACHE_DIR")

    def at(variable: str, *defaults: Path) -> tuple[Path, ...]:
        return (Path(environment[variable]),) if environment.get(variable) else defaults

    def folder(variable: str, purpose: str, severity: Status, *paths: Path) -> Folder:
        return Folder(variable=variable, paths=at(variable, *paths), purpose=purpose, severity=severity)

    return (
        folder("TMPDIR", "sockets between vLLM's processes, and logs", Status.FAIL, temporary),
        folder("HOME", "settings and caches of libraries", Status.WARN, home),
        folder("STEERLLM_CACHE", "the converted bundled model", bundled, cache_of_models(environment, home)),
        folder("HF_HOME", "models that are downloaded", Status.WARN, cache / "huggingface"),
        folder("VLLM_CACHE_ROOT", "what vLLM compiles, unless --enforce-eager is given", compiled, cache / "vllm"),
        folder("TORCHINDUCTOR_CACHE_DIR", "what torch compiles", compiled, temporary),
        folder("TRITON_CACHE_DIR", "kernels of GPUs", Status.WARN, home / ".triton" / "cache"),
        Folder(
            variable="NUMBA_CACHE_DIR",
            paths=(Path(own_numba),) if own_numba else (source, cache / "numba"),
            purpose="the compiled kernel of steering on a CPU",
            severity=Status.FAIL,
        ),
    )


def cache_of_models(environment: Mapping[str, str], home: Path) -> Path:
    """The folder of the converted bundled model's folder."""
    return Path(environment.get("STEERLLM_CACHE") or home / ".cache" / "steerllm")


def why_not_writable(path: Path) -> str:
    """Why no file can be written in this folder, or in the nearest one above it that exists; "" if one can."""
    existing = path
    try:
        while not existing.exists():
            existing = existing.parent
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return ""
