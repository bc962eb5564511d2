"""Shared memory: the directory of captures, and `/dev/shm`, which vLLM always uses for itself."""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from steer_service.cli.doctor.findings import Finding, fail, gib, ok, warn
from steer_service.shm.instances import orphans
from steer_service.shm.segments import DEFAULT_DIRECTORY, SegmentDirectory

IN_MEMORY = ("tmpfs", "ramfs")
"""File systems in memory."""

VLLM_BYTES = 240 << 20
"""Room that vLLM 0.32 wants to be free in `/dev/shm` for the queues between its processes; without it, it ends."""

ROOMY_BYTES = 1 << 30
"""Less is little for captures: one client may use a quarter of what there is."""

RAISE = (
    "raise it with `docker run --shm-size 8g`, `--ipc=host`, or in Kubernetes an emptyDir with medium: Memory, mounted "
    "at {path}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSystem:
    """Where a directory is."""

    kind: str
    """Its type, such as tmpfs; "" if it is not known."""
    total_bytes: int | None
    """Its size; None for no limit."""
    free_bytes: int | None
    """What is free; None for no limit."""


def check_shared_memory(directory: SegmentDirectory, vllm: Path = DEFAULT_DIRECTORY) -> Iterator[Finding]:
    """The directory of captures and, if it is another one, that of vLLM."""
    yield from _check_directory(directory)
    if not vllm.is_dir():
        yield fail("shared memory", f"there is no directory {vllm}, which vLLM needs; mount a tmpfs there")
    elif vllm.resolve() != directory.path.resolve():
        yield from _check_room("shared memory", vllm, file_system_of(vllm))
    yield from _check_orphans(directory.path)


def file_system_of(path: Path, mounts: Path = Path("/proc/self/mounts")) -> FileSystem:
    """The file system of a directory; raises OSError if there is no such directory."""
    place, kind, longest = str(path.resolve()), "", 0
    system = os.statvfs(path)
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        _, point, found, *_ = line.split()
        point = point.replace("\\040", " ")  # how the kernel writes a space
        if (place + "/").startswith(point.rstrip("/") + "/") and len(point) >= longest:
            kind, longest = found, len(point)
    return FileSystem(
        kind=kind,
        total_bytes=system.f_blocks * system.f_frsize or None,  # a tmpfs without a size limit has 0 blocks
        free_bytes=system.f_bavail * system.f_frsize if system.f_blocks else None,
    )


def _check_directory(directory: SegmentDirectory) -> Iterator[Finding]:
    path = directory.path
    system = file_system_of(path)
    problem = _creation_problem(directory)
    if problem:
        yield fail(
            "captures",
            f"no file can be created in {path} with these permissions: {problem}; mount it writable and with free "
            "space, or set --shm-dir (STEERLLM_SHM_DIR)",
        )
        return
    if system.kind not in IN_MEMORY:
        yield warn(
            "captures",
            f"{path} is on {system.kind or 'an unknown file system'} and not in memory: captures are written to a "
            "disk; mount a tmpfs there, or set --shm-dir (STEERLLM_SHM_DIR)",
        )
    yield from _check_room("captures", path, system, is_vllms=path.resolve() == DEFAULT_DIRECTORY.resolve())


def _creation_problem(directory: SegmentDirectory) -> str:
    """Why no segment can be created; "" if one can. Other than a segment, the file removes nothing of dead servers."""
    try:
        with tempfile.TemporaryFile(dir=directory.path) as file:
            if directory.group is not None:
                os.fchown(file.fileno(), -1, directory.group)
            os.posix_fallocate(file.fileno(), 0, 4096)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _check_room(check: str, path: Path, system: FileSystem, *, is_vllms: bool = True) -> Iterator[Finding]:
    if system.free_bytes is None or system.total_bytes is None:
        yield ok(check, f"{path} has no limit of its own")
        return
    size = f"{path} has {gib(system.total_bytes)}, {gib(system.free_bytes)} of it free"
    if is_vllms and system.free_bytes < VLLM_BYTES:
        yield fail(check, f"{size}; vLLM itself needs {gib(VLLM_BYTES)}: {RAISE.format(path=path)}")
    elif system.total_bytes < ROOMY_BYTES:
        share = gib(system.total_bytes // 4)
        yield warn(check, f"{size}; a client may have captures of {share}: {RAISE.format(path=path)}")
    else:
        yield ok(check, size)


def _check_orphans(path: Path) -> Iterator[Finding]:
    left = orphans(path)
    if left:
        size = sum(one.stat().st_size for one in left if one.is_file())
        yield warn(
            "orphans",
            f"{len(left)} files of servers that died are in {path}, {gib(size)}; the next `steer serve` of this user "
            "removes them",
        )
    else:
        yield ok("orphans", f"{path} has nothing of servers that died")
