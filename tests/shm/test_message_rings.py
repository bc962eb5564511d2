"""The rings between vLLM's processes fit `/dev/shm`, or the sentence has both numbers and what to do."""

import os
from pathlib import Path

import pytest

from steer_service.shm.message_rings import VARIABLE, Rings, fitting_rings, unwritten_bytes, why_too_small
from tests.shm.private_mounts import on_tmpfs

MIB = 1 << 20
SCRIPT = """
import json, os, sys
from pathlib import Path
from steer_service.shm.message_rings import fitting_rings, free_bytes_of, why_too_small
folder = Path(sys.argv[1])
rings = fitting_rings({workers}, free_bytes_of(folder), {{}})
print(json.dumps({{"mib": rings.total_mib, "problem": why_too_small(rings, folder, folder)}}))
"""


@pytest.mark.parametrize(("workers", "mib"), [(0, 0), (1, 400), (2, 664)])
def test_the_sizes_of_vllms_own_rings(workers: int, mib: int) -> None:
    assert Rings(workers=workers).total_mib == mib


def test_rings_are_small_where_vllms_own_take_more_than_a_quarter() -> None:
    assert fitting_rings(1, 1600 * MIB, {}).largest_mib is None
    assert fitting_rings(1, None, {}).largest_mib is None
    small = fitting_rings(1, 1600 * MIB - 1, {})
    assert (small.largest_mib, small.total_mib) == (1, 20)
    assert fitting_rings(1, 1600 * MIB, {VARIABLE: "4"}).total_mib == 80
    assert fitting_rings(1, 1600 * MIB, {VARIABLE: " 64 "}).total_mib == 880


def test_64_mib_of_a_container_are_enough_and_16_are_not(tmp_path: Path) -> None:
    assert on_tmpfs("size=64m", tmp_path, SCRIPT.format(workers=1)) == {"mib": 20, "problem": ""}
    small = on_tmpfs("size=16m", tmp_path, SCRIPT.format(workers=1))
    assert small["problem"] == (
        f"{tmp_path} has 16 MiB free, and 24 MiB are needed for messages between vLLM's processes (20 MiB) and "
        "captures (4 MiB): raise it with `docker run --shm-size 1g` or `--ipc=host`, or in Kubernetes with an emptyDir "
        f"with medium: Memory, mounted at {tmp_path}"
    )
    assert "and 118 MiB are needed" in on_tmpfs("size=64m", tmp_path, SCRIPT.format(workers=8))["problem"]
    assert on_tmpfs("size=256m", tmp_path, SCRIPT.format(workers=8)) == {"mib": 114, "problem": ""}


def test_a_directory_of_captures_that_is_full_is_named(tmp_path: Path) -> None:
    problem = on_tmpfs("size=1m", tmp_path, SCRIPT.format(workers=0))["problem"]
    assert "has 1 MiB free, and 4 MiB are needed for captures (--shm-dir, STEERLLM_SHM_DIR)" in problem


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert "which vLLM needs: mount a tmpfs there" in why_too_small(Rings(workers=1), tmp_path / "none", tmp_path)


def test_what_a_sparse_file_can_still_take_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(8 * MIB)
        os.posix_fallocate(file.fileno(), 0, MIB)
    assert unwritten_bytes([str(path), str(tmp_path / "gone")]) == pytest.approx(7 * MIB, abs=65536)
