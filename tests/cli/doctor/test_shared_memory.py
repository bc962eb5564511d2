"""Shared memory on real file systems: tmpfs of several sizes, a disk, and what a killed server left behind."""

import os
from pathlib import Path

import pytest

from steer_service.cli.doctor.shared_memory import check_shared_memory, file_system_of
from steer_service.shm.instances import orphans, sweep
from steer_service.shm.segments import SegmentDirectory
from tests.cli.doctor.found import by_check
from tests.shm.owner_processes import DIE, OWNER, WAIT, go_on, line_of, process
from tests.shm.private_mounts import on_tmpfs

SCRIPT = """
import json, sys
from pathlib import Path
from steer_service.cli.doctor.shared_memory import check_shared_memory
from steer_service.shm.segments import SegmentDirectory
folder = Path(sys.argv[1])
found = check_shared_memory(SegmentDirectory(path=folder), vllm=folder)
print(json.dumps({finding.check: [finding.status, finding.text] for finding in found}))
"""


@pytest.mark.parametrize(
    ("size", "captures", "shared_memory"),
    [
        ("size=1m", ("warn", "has 1 MiB"), ("fail", "1 MiB free, and 24 MiB are needed for messages between")),
        ("size=64m", ("warn", "have captures of 16 MiB"), ("ok", "has room for rings of 20 MiB; messages between")),
        ("size=512m", ("warn", "have captures of 128 MiB"), ("ok", "above 1 MiB go through sockets")),
        ("size=2g", ("ok", "has 2.0 GiB, 2.0 GiB of it free"), ("ok", "vLLM's own rings of 400 MiB")),
        ("size=0", ("ok", "has no limit of its own"), ("ok", "vLLM's own rings of 400 MiB")),
    ],
)
def test_the_size_of_dev_shm_is_judged_by_what_vllm_and_captures_need(
    tmp_path: Path, size: str, captures: tuple[str, str], shared_memory: tuple[str, str]
) -> None:
    found = on_tmpfs(size, tmp_path, SCRIPT)
    for (status, text), (expected, part) in ((found["captures"], captures), (found["shared memory"], shared_memory)):
        assert (status, part in text) == (expected, True), text


def test_a_directory_of_captures_alone_may_be_small_but_not_full_or_read_only(tmp_path: Path) -> None:
    assert on_tmpfs("size=1m", tmp_path, SCRIPT.replace(", vllm=folder", ""))["captures"][0] == "warn"
    found = on_tmpfs("size=1m,ro", tmp_path, SCRIPT)["captures"]
    assert found[0] == "fail"
    assert "Read-only file system; mount it writable" in found[1]
    full = on_tmpfs("size=1m,nr_inodes=1", tmp_path, SCRIPT)["captures"]
    assert full[0] == "fail"
    assert "No space left on device" in full[1]


def test_a_directory_on_a_disk_is_a_warning(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"/dev/vda / ext4 rw 0 0\n/dev/vdb {tmp_path}/with\\040space xfs rw 0 0\ntmpfs /tmpx tmpfs rw 0 0\n"
    )
    (tmp_path / "with space").mkdir()
    assert file_system_of(tmp_path, mounts).kind == "ext4"
    assert file_system_of(tmp_path / "with space", mounts).kind == "xfs"
    if file_system_of(tmp_path).kind in ("tmpfs", "ramfs"):
        pytest.skip("the temporary folder is in memory here")
    first = next(iter(check_shared_memory(SegmentDirectory(path=tmp_path), vllm=tmp_path)))
    assert (str(first.status), "and not in memory" in first.text) == ("warn", True)


def test_vllms_own_directory_must_exist(tmp_path: Path) -> None:
    found = by_check(check_shared_memory(SegmentDirectory(path=tmp_path), vllm=tmp_path / "none"))
    assert found["shared memory"] == (
        "fail",
        f"there is no folder {tmp_path}/none, which vLLM needs: mount a tmpfs there",
    )


def test_what_a_killed_server_left_is_counted_and_not_removed(tmp_path: Path) -> None:
    directory = SegmentDirectory(path=tmp_path)
    with process(tmp_path, OWNER + WAIT + DIE) as owner:
        names = line_of(owner).split()
        assert orphans(tmp_path) == []
        assert by_check(check_shared_memory(directory, vllm=tmp_path))["orphans"][0] == "ok"
        go_on(owner)
        owner.wait(30)
    before = sorted(os.listdir(tmp_path))

    assert sorted(path.name for path in orphans(tmp_path)) == sorted(names)
    status, text = by_check(check_shared_memory(directory, vllm=tmp_path))["orphans"]
    assert (status, text.partition(", 0 MiB")[0]) == (
        "warn",
        f"3 files of servers that died are in {tmp_path}",
    )
    assert sorted(os.listdir(tmp_path)) == before
    assert sweep(tmp_path) == len(names)
    assert orphans(tmp_path) == []
