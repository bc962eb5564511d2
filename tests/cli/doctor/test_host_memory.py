"""Memory by the files of the kernel: both versions of cgroups, nested, and in the namespace of a container."""

from pathlib import Path

import pytest

from steer_service.cli.doctor.host_memory import Files, Need, check_memory, room_of
from tests.cli.doctor.found import by_check, only

GIB = 1 << 30
NEED = Need(weights_bytes=2 * GIB, cache_bytes=GIB)


def machine(folder: Path, available_gib: float = 16, own: str = "0::/pod/server\n") -> Files:
    meminfo = folder / "meminfo"
    meminfo.write_text(f"MemTotal: {32 << 20} kB\nMemFree: 1 kB\nMemAvailable: {int(available_gib * (1 << 20))} kB\n")
    (folder / "own").write_text(own)
    return Files(meminfo=meminfo, own=folder / "own", root=folder / "cgroup")


def limit_v2(place: Path, limit: int | str, used: int, reclaimable: int = 0) -> None:
    place.mkdir(parents=True, exist_ok=True)
    (place / "memory.max").write_text(f"{limit}\n")
    (place / "memory.current").write_text(f"{used}\n")
    (place / "memory.stat").write_text(f"anon 1\ninactive_file {reclaimable}\n")


def limit_v1(place: Path, limit: int, used: int) -> None:
    place.mkdir(parents=True, exist_ok=True)
    (place / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (place / "memory.usage_in_bytes").write_text(f"{used}\n")
    (place / "memory.stat").write_text(f"inactive_file 7\ntotal_inactive_file {GIB}\n")


def test_without_a_limit_the_machine_counts(tmp_path: Path) -> None:
    files = machine(tmp_path)
    limit_v2(tmp_path / "cgroup/pod/server", "max", 5)
    room = room_of(files)
    assert (room.free_bytes, room.limit) == (16 * GIB, "of the 32.0 GiB of this machine")


def test_the_smallest_limit_of_the_groups_above_counts(tmp_path: Path) -> None:
    files = machine(tmp_path)
    limit_v2(tmp_path / "cgroup/pod/server", 8 * GIB, GIB)
    limit_v2(tmp_path / "cgroup/pod", 4 * GIB, 3 * GIB, reclaimable=2 * GIB)
    assert room_of(files).free_bytes == 3 * GIB
    limit_v2(tmp_path / "cgroup/pod/server", 2 * GIB, GIB)
    assert room_of(files).free_bytes == GIB


@pytest.mark.parametrize("path", ["/docker/abc", "/"])
def test_limits_of_the_first_version_are_read_also_at_the_root_of_a_container(tmp_path: Path, path: str) -> None:
    files = machine(tmp_path, own=f"5:cpu:/\n4:hugetlb,memory:{path}\n0::/\n")
    limit_v1(tmp_path / "cgroup/memory", 3 * GIB, 2 * GIB)
    assert room_of(files).free_bytes == 2 * GIB
    limit_v1(tmp_path / "cgroup/memory", 2**63 - 4096, 2 * GIB)
    assert room_of(files).free_bytes == 16 * GIB


def test_this_machine_has_memory() -> None:
    assert room_of(Files()).free_bytes > 0


@pytest.mark.parametrize(
    ("available_gib", "status", "text"),
    [(3.7, "fail", "end other programs"), (4.3, "warn", "--kv-cache-memory-bytes"), (4.9, "ok", "weights of 2.0 GiB")],
)
def test_the_model_and_its_cache_must_fit(tmp_path: Path, available_gib: float, status: str, text: str) -> None:
    found = only(check_memory(NEED, files=machine(tmp_path, available_gib)))
    assert (found[0], text in found[1]) == (status, True), found


def test_the_limit_of_a_container_is_named_with_what_raises_it(tmp_path: Path) -> None:
    files = machine(tmp_path)
    limit_v2(tmp_path / "cgroup/pod/server", 2 * GIB, 0)
    status, text = only(check_memory(NEED, files=files))
    assert status == "fail"
    assert text.startswith("2.0 GiB can be used (of the container's limit of 2.0 GiB)")
    assert "resources.limits.memory" in text


def test_on_a_gpu_its_own_memory_counts_for_the_weights(tmp_path: Path) -> None:
    files = machine(tmp_path, 1.5)
    assert by_check(check_memory(NEED, gpu_free_bytes=80 * GIB, files=files))["memory"][0] == "ok"
    found = by_check(check_memory(NEED, gpu_free_bytes=GIB, files=files))
    assert found["gpu memory"][0] == "fail"
    assert "--tensor-parallel-size" in found["gpu memory"][1]


def test_an_unknown_model_shows_what_there_is(tmp_path: Path) -> None:
    assert only(check_memory(None, files=machine(tmp_path)))[0] == "ok"
