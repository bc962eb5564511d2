"""Memory of the machine, within the limit of the container, and what the model needs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from steer_service.cli.doctor.findings import Finding, fail, gib, ok, warn

PROCESS_BYTES = 1 << 30
"""What the server and vLLM's engine core need of the host besides the model, if that is on a GPU."""

CPU_PROCESS_BYTES = 1800 << 20
"""What all processes need besides the weights and the cache on a CPU: measured 1.8 GiB with the bundled model, 0.55 of
it in the server, 0.5 in the engine core and 0.75 in the worker."""

NO_LIMIT = 1 << 60
"""cgroup v1 says that there is no limit by a number above this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Memory that can be used."""

    free_bytes: int
    """Bytes that this process may still use."""
    limit: str
    """Where the bound comes from."""
    remedy: str
    """How to raise it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a model needs."""

    weights_bytes: int
    """Its weights."""
    cache_bytes: int
    """Keys and values, by default; 0 if vLLM chooses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Where the kernel says it."""

    meminfo: Path = Path("/proc/meminfo")
    own: Path = Path("/proc/self/cgroup")
    root: Path = Path("/sys/fs/cgroup")


_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
"""Files of the limit and of what is used, and the entry of memory.stat with what the kernel gives back on demand."""


def check_memory(need: Need | None, *, gpu_free_bytes: int = 0, files: Files | None = None) -> Iterator[Finding]:
    """Whether the model fits. `need`: None if it is not known; `gpu_free_bytes`: of the largest GPU, 0 without one."""
    room = room_of(files or Files())
    has = f"{gib(room.free_bytes)} can be used ({room.limit})"
    if need is None:
        yield ok("memory", has)
        return
    weights = f"weights of {gib(need.weights_bytes)}"
    if gpu_free_bytes and gpu_free_bytes < need.weights_bytes:
        yield fail(
            "gpu memory",
            f"{gib(gpu_free_bytes)} are free on the largest GPU, and the model has {weights}; split it over several "
            "with --tensor-parallel-size, or end what uses the GPU",
        )
    on_host = 0 if gpu_free_bytes else need.weights_bytes
    processes = PROCESS_BYTES if gpu_free_bytes else CPU_PROCESS_BYTES
    least = processes + on_host
    wanted = least + (0 if gpu_free_bytes else need.cache_bytes)
    what = f"the processes need {gib(processes)}" + ("" if gpu_free_bytes else f", and the model has {weights}")
    if room.free_bytes < least:
        yield fail("memory", f"{has}; {what}: {room.remedy}")
    elif room.free_bytes < wanted:
        yield warn(
            "memory",
            f"{has}; {what} and a cache of {gib(need.cache_bytes)}: {room.remedy}, or set a smaller "
            "--kv-cache-memory-bytes",
        )
    else:
        yield ok("memory", f"{has}; {what}")


def room_of(files: Files) -> Room:
    """The smallest of what the machine has available and what each cgroup of this process leaves."""
    rooms = [_room_of_machine(files.meminfo), *_rooms_of_cgroups(files)]
    return min(rooms, key=lambda room: room.free_bytes)


def _room_of_machine(meminfo: Path) -> Room:
    entries = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines() if ":" in line)
    available, total = (int(entries[name].split()[0]) << 10 for name in ("MemAvailable", "MemTotal"))
    return Room(
        free_bytes=available, limit=f"of the {gib(total)} of this machine", remedy="end other programs, or add memory"
    )


def _rooms_of_cgroups(files: Files) -> Iterator[Room]:
    for line in files.own.read_text(encoding="utf-8").splitlines() if files.own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _rooms(files.root, path, _V2)
        elif "memory" in controllers.split(","):
            yield from _rooms(files.root / "memory", path, _V1)


def _rooms(root: Path, path: str, names: tuple[str, str, str]) -> Iterator[Room]:
    # In a container the path may be that of the host, and the limit at the root: each folder above counts as well.
    folder = root / path.strip("/")
    for place in (folder, *folder.parents):
        room = _room_in(place, names)
        if room is not None:
            yield room
        if place == root:
            return


def _room_in(place: Path, names: tuple[str, str, str]) -> Room | None:
    limit_name, used_name, reclaimable = names
    try:
        limit = (place / limit_name).read_text(encoding="ascii").strip()
        used = int((place / used_name).read_text(encoding="ascii"))
        entries = dict(line.split() for line in (place / "memory.stat").read_text(encoding="ascii").splitlines())
    except FileNotFoundError:
        return None
    if limit == "max" or int(limit) > NO_LIMIT:
        return None
    return Room(
        free_bytes=max(0, int(limit) - used + int(entries.get(reclaimable, 0))),
        limit=f"of the container's limit of {gib(int(limit))}",
        remedy="raise the limit of the container (`docker run --memory`, resources.limits.memory)",
    )
