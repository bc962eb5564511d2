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


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What a server does, on which it depends which folders it writes to."""

    converts: bool
    """It converts the bundled model."""
    downloads: bool
    """It downloads its model."""
    compiles: bool
    """vLLM compiles its model, and ends if it cannot keep the result."""
    on_gpu: bool
    """It runs on a GPU, with kernels of Triton, or else on a CPU, with one of Numba."""


def folders_of(environment: Mapping[str, str], use: Use) -> tuple[Folder, ...]:
    """The folders of a server with these environment variables."""
    home = Path(environment.get("HOME") or os.path.expanduser("~"))
    cache = Path(environment.get("XDG_CACHE_HOME") or home / ".cache")
    temporary = Path(environment.get("TMPDIR") or "/tmp")
    compiled = Status.FAIL if use.compiles else Status.WARN

    def folder(variable: str, purpose: str, severity: Status, *paths: Path) -> Folder:
        given = environment.get(variable)
        return Folder(variable=variable, paths=(Path(given),) if given else paths, purpose=purpose, severity=severity)

    found = [
        folder("TMPDIR", "sockets between vLLM's processes, and logs", Status.FAIL, temporary),
        folder("HOME", "settings and caches of libraries", Status.WARN, home),
        folder("VLLM_CACHE_ROOT", "what vLLM compiles, unless --enforce-eager is given", compiled, cache / "vllm"),
        folder("TORCHINDUCTOR_CACHE_DIR", "what torch compiles", compiled, temporary),
    ]
    if use.converts:
        default = home / ".cache" / "steerllm"
        found.append(folder("STEERLLM_CACHE", "the converted bundled model", Status.FAIL, default))
    if use.downloads:
        found.append(folder("HF_HOME", "the model, which is downloaded", Status.FAIL, cache / "huggingface"))
    if use.on_gpu:
        found.append(folder("TRITON_CACHE_DIR", "the kernels", Status.FAIL, home / ".triton" / "cache"))
    else:
        beside = Path(__file__).parents[2] / "ops" / "__pycache__"
        found.append(folder("NUMBA_CACHE_DIR", "the compiled kernel", Status.FAIL, beside, cache / "numba"))
    return tuple(found)


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
