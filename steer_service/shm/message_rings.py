"""Room for the rings in `/dev/shm` through which vLLM's processes send each other messages.

vLLM makes a ring for the engine core and one for each worker, as sparse files: they take memory where messages were
written. If `/dev/shm` is then full, the next message ends the process with SIGBUS. So the rings are made as small as
`/dev/shm` demands; a message that does not fit in one goes through a socket.

Relies on (vLLM 0.24 to 0.33): rings of 10 parts, of VLLM_MQ_MAX_CHUNK_BYTES_MB (16) for the engine core and of 24 MiB
for each worker; with several workers one ring more, of 24 MiB.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "VLLM_MQ_MAX_CHUNK_BYTES_MB"
"""vLLM's variable of the largest message of the engine core in its ring, in MiB; here also of those of workers."""

PARTS = 10
"""Messages in one ring."""
CORE_MIB, WORKER_MIB, GROUP_MIB = 16, 24, 24
"""vLLM's own sizes: the largest message of the engine core and of a worker, and the ring between several workers."""
SMALL_MIB = 1
"""The largest message in small rings."""

SHARE = 4
"""vLLM's own sizes are kept if the rings are at most 1/4 of what is free: the rest is for captures."""

CAPTURE_MIB = 4
"""Free memory in the directory of captures with which a server starts: less has no room for marks of steered rows."""

RAISE = (
    "raise it with `docker run --shm-size 1g` or `--ipc=host`, or in Kubernetes with an emptyDir with medium: Memory, "
    "mounted at {path}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rings:
    """The rings of an engine."""

    workers: int
    """Workers on this host that get their messages through rings; 0 for one worker within the engine core."""
    largest_mib: int | None = None
    """The value of VARIABLE; None for vLLM's own sizes."""

    @property
    def total_mib(self) -> int:
        """Size of all rings, in MiB."""
        if not self.workers:
            return 0
        core = self.largest_mib or CORE_MIB
        worker = min(core, WORKER_MIB) if self.largest_mib else WORKER_MIB
        return PARTS * (core + self.workers * worker) + (GROUP_MIB if self.workers > 1 else 0)


def fitting_rings(workers: int, free_bytes: int | None, environment: Mapping[str, str]) -> Rings:
    """The rings for this much free memory (None: no limit): those of the environment, vLLM's own, or small ones."""
    given = environment.get(VARIABLE, "").strip()
    if given.isdecimal() and int(given):
        return Rings(workers=workers, largest_mib=int(given))
    own = Rings(workers=workers)
    fits = free_bytes is None or own.total_mib << 20 <= free_bytes // SHARE
    return own if fits else Rings(workers=workers, largest_mib=SMALL_MIB)


def free_bytes_of(folder: Path) -> int | None:
    """Free bytes of a file system; None if it has no limit."""
    system = os.statvfs(folder)
    return system.f_bavail * system.f_frsize if system.f_blocks else None  # a tmpfs without a limit has 0 blocks


def why_too_small(rings: Rings, folder: Path, captures: Path) -> str:
    """Why an engine with these rings in `folder` and captures in `captures` cannot start; "" if it can.

    The text has the size that is needed, what is there, and how to raise it.
    """
    if not folder.is_dir():
        return f"there is no folder {folder}, which vLLM needs: mount a tmpfs there" if rings.workers else ""
    if not rings.workers or os.stat(folder).st_dev != os.stat(captures).st_dev:
        return _lack(folder, rings.total_mib, "messages between vLLM's processes") or _lack(
            captures, CAPTURE_MIB, "captures (--shm-dir, STEERLLM_SHM_DIR)"
        )
    what = f"messages between vLLM's processes ({rings.total_mib} MiB) and captures ({CAPTURE_MIB} MiB)"
    return _lack(folder, rings.total_mib + CAPTURE_MIB, what)


def unwritten_bytes(files: list[str]) -> int:
    """Bytes that sparse files can still take when they are written to."""
    total = 0
    for path in files:
        try:
            status = os.stat(path)
        except OSError:  # removed with its engine
            continue
        total += max(0, status.st_size - status.st_blocks * 512)
    return total


def _lack(folder: Path, needed_mib: int, what: str) -> str:
    free = free_bytes_of(folder)
    if free is None or free >= needed_mib << 20:
        return ""
    return f"{folder} has {free >> 20} MiB free, and {needed_mib} MiB are needed for {what}: " + RAISE.format(
        path=folder
    )
