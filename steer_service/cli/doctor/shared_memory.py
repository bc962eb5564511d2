"""Shared memory: the directory of captures, and `/dev/shm`, which vLLM always uses for itself."""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from steer_service.cli.doctor.findings import Finding, fail, gib, ok, warn
from steer_service.shm.instances import orphans
from steer_service.shm.message_rings import RAISE, fitting_rings, free_bytes_of, why_too_small
from steer_service.shm.message_rings import VARIABLE as RINGS
from steer_service.shm.segments import DEFAULT_DIRECTORY, SegmentDirectory

IN_MEMORY = ("tmpfs", "ramfs")
"""File systems in memory."""

ROOMY_BYTES = 1 << 30
"""Less is little for captures: one client may use a quarter of what there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSystem:
    """Where a directory is."""

    kind: str
    """Its type, such as tmpfs; "" if it is not known."""
    total_bytes: int | None
    """Its size; None for no limit."""
    free_bytes: int | None
    """What is free; None for no limit."""


def check_shared_memory(
    directory: SegmentDirectory, vllm: Path = DEFAULT_DIRECTORY, *, workers: int = 1
) -> Iterator[Finding]:
    """The directory of captures, and that of messages between vLLM's processes, of which `workers` are beside the core.

    The rule of sizes is that of the start of an engine.
    """
    yield from _check_directory(directory)
    rings = fitting_rings(workers, free_bytes_of(vllm) if vllm.is_dir() else 0, os.environ)
    problem = why_too_small(rings, vllm, directory.path)
    if problem:
        yield fail("shared memory", problem)
    elif rings.largest_mib is not None and workers:
        small = f"messages between vLLM's processes above {rings.largest_mib} MiB go through sockets ({RINGS})"
        yield ok("shared memory", f"{vllm} has room for rings of {rings.total_mib} MiB; {small}")
    else:
        yield ok("shared memory", f"{vllm} has room for vLLM's own rings of {rings.total_mib} MiB")
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
    yield _check_room(path, system)


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


def _check_room(path: Path, system: FileSystem) -> Finding:
    if system.free_bytes is None or system.total_bytes is None:
        return ok("captures", f"{path} has no limit of its own")
    size = f"{path} has {gib(system.total_bytes)}, {gib(system.free_bytes)} of it free"
    if system.total_bytes < ROOMY_BYTES:
        share = gib(system.total_bytes // 4)
        return warn("captures", f"{size}; a client may have captures of {share}: {RAISE.format(path=path)}")
    return ok("captures", size)


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
