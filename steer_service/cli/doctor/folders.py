"""Folders that a server writes to. In a pod, the root file system is often read-only."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from steer_service.cli.doctor.findings import Finding, Status, ok
from steer_service.core.cache_folder import (
    CODE_CACHES,
    ROOT,
    cache_root,
    user_cache,
    why_not_writable,
    why_unusable,
)
from steer_service.hf.bundled_model import CONVERTED_BYTES

MOUNT = "mount a writable volume there, such as an emptyDir"


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """A folder that should be writable."""

    variable: str
    """The environment variable that names it."""
    path: Path
    """Where it is."""
    purpose: str
    """What it is for."""
    severity: Status = Status.WARN
    """How serious it is if it cannot be used."""
    why_unusable: Callable[[Path], str] = why_unusable
    """Why it cannot be used; "" if it can."""
    instead: str = "each start uses a temporary folder and compiles again; "
    """What a server does then."""


def check_folders(folders: tuple[Folder, ...]) -> Iterator[Finding]:
    """Whether each folder can be used, or created; a cache that cannot is made anew at each start."""
    for folder in folders:
        problem = folder.why_unusable(folder.path)
        if not problem:
            yield ok(folder.variable, f"{folder.path} can be written to ({folder.purpose})")
            continue
        yield Finding(
            check=folder.variable,
            status=folder.severity,
            text=f"{folder.path} cannot be used ({problem}) for {folder.purpose}; {folder.instead}{MOUNT}, or set "
            f"{folder.variable} to a folder that this user alone can write to",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What a server does, on which it depends which folders it writes to."""

    converts: bool
    """It converts the bundled model."""
    downloads: bool
    """It downloads its model."""
    on_gpu: bool
    """It runs on a GPU, with kernels of Triton."""


def folders_of(environment: Mapping[str, str], use: Use) -> tuple[Folder, ...]:
    """The folders of a server with these environment variables."""
    root = cache_root(environment)
    hub = Path(environment.get("HF_HOME") or user_cache(environment) / "huggingface")
    found = [
        Folder(
            variable="TMPDIR",
            path=_temporary_folder(environment),
            purpose="sockets between vLLM's processes, and logs",
            severity=Status.FAIL,
            why_unusable=why_not_writable,
            instead="",
        ),
        Folder(variable=ROOT, path=root, purpose="all caches", why_unusable=why_unusable),
    ]
    found += [
        Folder(variable=variable, path=Path(environment[variable]), purpose=f"the cache of {CODE_CACHES[variable]}")
        for variable in CODE_CACHES
        if environment.get(variable) and (use.on_gpu or variable != "TRITON_CACHE_DIR")
    ]
    if use.converts:
        found.append(
            Folder(
                variable=ROOT,
                path=root,
                purpose="the converted bundled model",
                why_unusable=lambda path: why_unusable(path, CONVERTED_BYTES),
                instead="each start converts it into a temporary folder; ",
            )
        )
    if use.downloads:
        found.append(
            Folder(
                variable="HF_HOME",
                path=hub,
                purpose="the model, which is downloaded",
                why_unusable=why_not_writable,
                instead="it is downloaded into the folder of all caches; ",
            )
        )
    return tuple(found)


def _temporary_folder(environment: Mapping[str, str]) -> Path:
    """The folder that Python's `tempfile` chooses: the first that can be written to."""
    places = [Path(environment.get(name) or "/tmp") for name in ("TMPDIR", "TEMP", "TMP")] + [Path("/var/tmp")]
    return next((path for path in places if path.is_dir() and not why_not_writable(path)), places[0])
