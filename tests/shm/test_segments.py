"""Segments: private, new, wholly there, and nothing else in the directory is touched."""

import errno
import mmap
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from steer_service.shm.segments import PREFIX, Segment, SegmentDirectory

SIZE = 3 * mmap.PAGESIZE + 5


def test_a_segment_is_zeroed_and_has_the_size_asked_for(tmp_path: Path) -> None:
    segment = SegmentDirectory(path=tmp_path).create(SIZE)

    assert segment.size == SIZE == os.stat(tmp_path / segment.name).st_size
    assert bytes(segment.memory) == bytes(SIZE)


def test_only_its_owner_may_read_or_write_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        segment = SegmentDirectory(path=tmp_path).create(SIZE)
    finally:
        os.umask(before)

    assert stat.S_IMODE(os.stat(tmp_path / segment.name).st_mode) == 0o600


def test_every_byte_is_allocated_so_that_no_later_write_can_fail(tmp_path: Path) -> None:
    segment = SegmentDirectory(path=tmp_path).create(1 << 20)

    assert os.stat(tmp_path / segment.name).st_blocks * 512 >= 1 << 20


def test_names_begin_with_the_prefix_and_cannot_be_guessed(tmp_path: Path) -> None:
    names = [SegmentDirectory(path=tmp_path).create(1).name for _ in range(20)]

    assert len(set(names)) == 20
    assert all(name.startswith(PREFIX) and len(name) == len(PREFIX) + 32 for name in names)


def test_a_name_that_exists_already_is_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{PREFIX}taken").write_bytes(b"another's")
    monkeypatch.setattr("secrets.token_hex", lambda _: "taken")

    with pytest.raises(FileExistsError):
        SegmentDirectory(path=tmp_path).create(SIZE)

    assert (tmp_path / f"{PREFIX}taken").read_bytes() == b"another's"


def test_what_one_side_writes_the_other_reads(tmp_path: Path) -> None:
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
    assert list(tmp_path.iterdir()) == []


def array_over_unlinked(segment: Segment) -> np.ndarray:
    segment.unlink()
    return np.frombuffer(segment.memory, np.uint8)


def test_unlinking_twice_is_no_error(tmp_path: Path) -> None:
    segment = SegmentDirectory(path=tmp_path).create(SIZE)

    segment.unlink()
    segment.unlink()

    assert list(tmp_path.iterdir()) == []


def test_whoever_opened_a_segment_may_unlink_it_first(tmp_path: Path) -> None:
    mine = SegmentDirectory(path=tmp_path).create(SIZE)
    SegmentDirectory(path=tmp_path).open(mine.name, SIZE).unlink()

    mine.unlink()

    assert list(tmp_path.iterdir()) == []


def test_segments_leave_no_open_file_behind(tmp_path: Path) -> None:
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
    assert list(tmp_path.iterdir()) == []


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
