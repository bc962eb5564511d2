"""Segments: private, new, wholly there, and nothing else in the directory is touched."""

import errno
import mmap
import os
import re
import stat
import tempfile
from pathlib import Path

import numpy as np
import pytest

from steer_service.core.errors import InvalidRequest
from steer_service.shm.instances import claim
from steer_service.shm.segments import PREFIX, Segment, SegmentDirectory, private_segment, segment_directory
from tests.shm.folders import segments_in

SIZE = 3 * mmap.PAGESIZE + 5
NOBODY = 65534
GROUP = 54321


def test_a_segment_is_zeroed_and_has_the_size_asked_for(tmp_path: Path) -> None:
    segment = SegmentDirectory(path=tmp_path).create(SIZE)

    assert segment.size == SIZE == os.stat(tmp_path / segment.name).st_size
    assert bytes(segment.memory) == bytes(SIZE)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644])
@pytest.mark.parametrize("umask", [0, 0o077])
def test_its_permissions_are_those_chosen_whatever_the_umask(mode: int, umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        segment = SegmentDirectory(path=tmp_path, mode=mode).create(SIZE)
    finally:
        os.umask(before)

    assert stat.S_IMODE(os.stat(tmp_path / segment.name).st_mode) == mode


def test_by_default_only_the_owner_may_read_or_write_a_segment(tmp_path: Path) -> None:
    segment = SegmentDirectory(path=tmp_path).create(SIZE)

    assert stat.S_IMODE(os.stat(tmp_path / segment.name).st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize(("mode", "is_readable"), [(0o600, False), (0o640, True)])
def test_group_members_may_read_if_chosen_and_never_write(mode: int, is_readable: bool) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        os.chmod(folder, 0o755)
        segment = SegmentDirectory(path=Path(folder), mode=mode, group=GROUP).create(SIZE)
        path = Path(folder, segment.name)

        assert os.stat(path).st_gid == GROUP
        assert can_open(path, os.O_RDONLY, groups=[GROUP]) is is_readable
        assert not can_open(path, os.O_RDWR, groups=[GROUP])
        assert not can_open(path, os.O_RDONLY, groups=[])


def can_open(path: Path, flags: int, groups: list[int]) -> bool:
    """Whether a user who is nobody, but in these groups, can open it."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups(groups)
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            os.open(path, flags)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_every_byte_is_allocated_so_that_no_later_write_can_fail(tmp_path: Path) -> None:
    segment = SegmentDirectory(path=tmp_path).create(1 << 20)

    assert os.stat(tmp_path / segment.name).st_blocks * 512 >= 1 << 20


def test_names_begin_with_the_prefix_and_cannot_be_guessed(tmp_path: Path) -> None:
    names = [SegmentDirectory(path=tmp_path).create(1).name for _ in range(20)]

    assert len(set(names)) == 20
    assert all(re.fullmatch(f"{PREFIX}{claim(tmp_path)}-[0-9a-f]{{32}}", name) for name in names)


def test_a_name_that_exists_already_is_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = tmp_path / f"{PREFIX}{claim(tmp_path)}-taken"
    taken.write_bytes(b"another's")
    monkeypatch.setattr("secrets.token_hex", lambda _: "taken")

    with pytest.raises(FileExistsError):
        SegmentDirectory(path=tmp_path).create(SIZE)

    assert taken.read_bytes() == b"another's"


def test_rows_written_by_one_side_are_read_by_the_other(tmp_path: Path) -> None:
    mine = SegmentDirectory(path=tmp_path).create(SIZE)
    theirs = SegmentDirectory(path=tmp_path).open(mine.name, SIZE)

    theirs.memory[10:15] = b"hello"
    mine.memory[SIZE - 1] = 7

    assert mine.memory[10:15] == b"hello"
    assert theirs.memory[SIZE - 1] == 7


def test_memory_outlives_its_name_for_as_long_as_an_array_needs_it(tmp_path: Path) -> None:
    array = array_over_unlinked(SegmentDirectory(path=tmp_path).create(SIZE))

    array[:] = 1

    assert array.sum() == SIZE
    assert segments_in(tmp_path) == []


def array_over_unlinked(segment: Segment) -> np.ndarray:
    segment.unlink()
    return np.frombuffer(segment.memory, np.uint8)


def test_unlinking_twice_is_no_error(tmp_path: Path) -> None:
    segment = SegmentDirectory(path=tmp_path).create(SIZE)

    segment.unlink()
    segment.unlink()

    assert segments_in(tmp_path) == []


def test_memory_without_a_name_has_none_to_unlink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    segment = private_segment(SIZE)

    segment.unlink()

    assert (segment.name, segment.size, bytes(segment.memory)) == ("", SIZE, bytes(SIZE))
    assert tmp_path.is_dir()


def test_the_process_that_opened_a_segment_may_unlink_it_first(tmp_path: Path) -> None:
    mine = SegmentDirectory(path=tmp_path).create(SIZE)
    SegmentDirectory(path=tmp_path).open(mine.name, SIZE).unlink()

    mine.unlink()

    assert segments_in(tmp_path) == []


def test_segments_leave_no_open_file_behind(tmp_path: Path) -> None:
    claim(tmp_path)  # its lock stays open
    before = len(os.listdir("/proc/self/fd"))

    segments = [SegmentDirectory(path=tmp_path).create(SIZE) for _ in range(10)]
    segments += [SegmentDirectory(path=tmp_path).open(segment.name, SIZE) for segment in segments]

    # Python's mmap keeps a duplicate of the descriptor; dropping the segments drops them.
    del segments
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_segment_that_cannot_be_mapped_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised:
        SegmentDirectory(path=tmp_path).create(0)

    assert raised.value.errno == errno.EINVAL
    assert segments_in(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["foreign", "", "../steerllm-x", f"{PREFIX}/../../etc/passwd", f"a{PREFIX}", "/etc/hosts"]
)
def test_a_foreign_name_is_refused_before_anything_is_opened(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a segment of this project"):
        SegmentDirectory(path=tmp_path).open(name, SIZE)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(bytes(SIZE))
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path / "target")

    with pytest.raises(OSError) as raised:
        SegmentDirectory(path=tmp_path).open(f"{PREFIX}link", SIZE)

    assert raised.value.errno == errno.ELOOP


def test_a_segment_smaller_than_expected_is_refused(tmp_path: Path) -> None:
    segment = SegmentDirectory(path=tmp_path).create(SIZE)

    with pytest.raises(ValueError, match="length is greater than file size"):
        SegmentDirectory(path=tmp_path).open(segment.name, SIZE + 1)


def test_a_segment_that_is_gone_cannot_be_opened(tmp_path: Path) -> None:
    segment = SegmentDirectory(path=tmp_path).create(SIZE)
    segment.unlink()

    with pytest.raises(FileNotFoundError):
        SegmentDirectory(path=tmp_path).open(segment.name, SIZE)


def test_a_directory_is_chosen_as_users_write_it(tmp_path: Path) -> None:
    chosen = segment_directory(str(tmp_path), "0640", "12")

    assert chosen == SegmentDirectory(path=tmp_path, mode=0o640, group=12)
    assert segment_directory(str(tmp_path), "600", "root").group == 0
    assert segment_directory(str(tmp_path), "600", "").group is None


@pytest.mark.parametrize("mode", ["", "rw", "0", "400", "604", "660", "666", "700", "-600", "1600", "680"])
def test_invalid_permissions_and_those_that_let_others_write_are_refused(mode: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as raised:
        segment_directory(str(tmp_path), mode, "")

    assert raised.value.field == "shm_mode"


@pytest.mark.parametrize("group", ["no such group", "-1", "4294967295", "9" * 30])
def test_a_group_that_cannot_be_is_refused(group: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as raised:
        segment_directory(str(tmp_path), "640", group)

    assert raised.value.field == "shm_group"


def test_a_path_that_is_not_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    for path in ("file", "none", "file/below"):
        with pytest.raises(InvalidRequest) as raised:
            segment_directory(str(tmp_path / path), "600", "")
        assert raised.value.field == "shm_dir"


def test_a_directory_is_checked_by_creating_a_segment_there(tmp_path: Path) -> None:
    SegmentDirectory(path=tmp_path).check()

    assert segments_in(tmp_path) == []


def test_a_directory_in_which_nothing_can_be_created_is_refused() -> None:
    with pytest.raises(InvalidRequest) as raised:
        SegmentDirectory(path=Path("/proc/self")).check()

    assert raised.value.field == "shm_dir"
    assert "/proc" not in raised.value.message
