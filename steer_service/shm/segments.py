"""Shared-memory segments: created by the server under random names, opened by its workers.

`multiprocessing.shared_memory` is not used: before Python 3.13 its tracker deletes segments that others still use.
"""

import errno
import grp
import mmap
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from steer_service.core.errors import InvalidRequest, Overloaded
from steer_service.core.mapping import MMAP_WITHOUT_FD
from steer_service.shm.instances import PREFIX, claim

DEFAULT_DIRECTORY = Path("/dev/shm")

RETRY_AFTER_S = 1.0
"""Seconds after which a client may ask again for a segment that the system had no room for."""

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE})
"""Errors raised when the system's memory, the file system or the table of open files is full."""

MAX_GROUP_ID = 2**32 - 2
"""The largest group id in Linux; the next number means "do not change the group"."""

MODES = (0o600, 0o640, 0o644)
"""Permissions that a segment may have: only its owner writes."""


class Segment:
    """One mapped segment; the process that created it unlinks it."""

    def __init__(self, memory: mmap.mmap, path: Path | None = None) -> None:
        self.memory = memory
        """The mapping; stays until the last array over it is freed."""
        self._path = path

    @property
    def name(self) -> str:
        """File name within the directory; "" for memory that has none."""
        return self._path.name if self._path is not None else ""

    @property
    def size(self) -> int:
        """Bytes of the segment."""
        return len(self.memory)

    def unlink(self) -> None:
        """Removes the segment's name, if it still has one; mappings stay valid."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentDirectory:
    """The directory of segments, and which users besides this one may read them."""

    path: Path = DEFAULT_DIRECTORY
    """A directory in memory (tmpfs); the default is that of POSIX shared memory on Linux."""
    mode: int = 0o600
    """Permissions of a segment; clients that run as another user need 0o640 and a `group` that they are in."""
    group: int | None = None
    """Group id of a segment. Default: this process's, or the directory's if its setgid bit is set."""

    def create(self, size: int) -> Segment:
        """Creates a zeroed segment of `size` bytes, all of them allocated: no later write can fail.

        Raises Overloaded (SHM_SPACE) if the system has no room for it, OSError for a bad size or directory.
        """
        try:
            return self._created(size)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise Overloaded(
                f"{size} bytes of capture memory asked for, and the system has no room for them",
                reason="SHM_SPACE",
                retry_after_s=RETRY_AFTER_S,
            ) from error

    def total_bytes(self) -> int | None:
        """The size of the file system in bytes; None if it has no limit."""
        system = os.statvfs(self.path)
        return system.f_blocks * system.f_frsize or None  # a tmpfs without a size limit has 0 blocks

    def free_bytes(self) -> int | None:
        """Free bytes of the file system; None if it has no limit."""
        system = os.statvfs(self.path)
        return system.f_bavail * system.f_frsize if system.f_blocks else None

    def check(self) -> None:
        """Raises InvalidRequest if no segment can be created here, Overloaded if the system has no room for one."""
        try:
            self.create(1).unlink()
        except OSError as error:
            raise InvalidRequest(
                f"no file can be created in this directory with these permissions: {error.strerror}",
                field="shm_dir",
            ) from error

    def _created(self, size: int) -> Segment:
        path = self.path / f"{PREFIX}{claim(self.path)}-{secrets.token_hex(16)}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode=0o600)
        try:
            if self.group is not None:
                os.fchown(descriptor, -1, self.group)
            os.fchmod(descriptor, self.mode)  # independent of the umask
            os.posix_fallocate(descriptor, 0, size)
            return Segment(mmap.mmap(descriptor, size, **MMAP_WITHOUT_FD), path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)

    def open(self, name: str, size: int) -> Segment:
        """Maps a segment that the server created, for writing; raises ValueError for the name of any other file."""
        if not name.startswith(PREFIX) or "/" in name:
            raise ValueError("not a segment of this project")
        path = self.path / name
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return Segment(mmap.mmap(descriptor, size, **MMAP_WITHOUT_FD), path)
        finally:
            os.close(descriptor)


def private_segment(size: int) -> Segment:
    """A segment without a name: `size` zeroed bytes that only this process has."""
    return Segment(mmap.mmap(-1, size))


def private_copy(segment: Segment) -> Segment:
    """A private segment with the bytes that `segment` has now."""
    copy = private_segment(segment.size)
    copy.memory[:] = segment.memory[:]
    return copy


def segment_directory(path: str, mode: str, group: str) -> SegmentDirectory:
    """The SegmentDirectory of settings: permissions in octal; the group as a name, a number or "" for the default.

    Raises InvalidRequest, with the field's name, if `path` is not a directory, `mode` is not in MODES, or there is no
    such group.
    """
    if not os.path.isdir(path):
        raise InvalidRequest(f"{path!r} is not a directory", field="shm_dir")
    try:
        bits = int(mode, 8)
    except ValueError:
        raise InvalidRequest(f"{mode!r} is not a number in octal", field="shm_mode") from None
    if bits not in MODES:
        raise InvalidRequest(f"{mode!r} is not one of 600, 640 and 644", field="shm_mode")
    return SegmentDirectory(path=Path(path), mode=bits, group=group_id(group, "shm_group"))


def group_id(group: str, field: str) -> int | None:
    """The number of a group given by name or number; None for "". Raises InvalidRequest, which names `field`."""
    if not group:
        return None
    try:
        number = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
        if number > MAX_GROUP_ID:
            raise KeyError
        return number
    except KeyError:
        raise InvalidRequest(f"there is no group {group!r}", field=field) from None
