"""Shared-memory segments: created by the server under unguessable names, opened by its workers.

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
"""When to ask again for a segment for which the system had no room, in seconds."""

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE})
"""Errors that say that the system's memory, the file system or the table of open files is full."""

MAX_GROUP_ID = 2**32 - 2
"""The largest that Linux has; one more means "leave it as it is"."""

MODES = (0o600, 0o640, 0o644)
"""Permissions that a segment may have: its owner writes, and nobody else does."""


class Segment:
    """One mapped segment; whoever created it unlinks it."""

    def __init__(self, memory: mmap.mmap, path: Path | None = None) -> None:
        self.memory = memory
        """The mapping; lives until the last array over it is gone."""
        self._path = path

    @property
    def name(self) -> str:
        """File name within the directory; "" for memory that has none."""
        return self._path.name if self._path is not None else ""

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.memory)

    def unlink(self) -> None:
        """Removes the name, if there is one; mappings stay valid. A name that is gone already is no error."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentDirectory:
    """Where segments lie, and who besides this user may read them."""

    path: Path = DEFAULT_DIRECTORY
    """A directory in memory (tmpfs); the default is where POSIX shared memory lies on Linux."""
    mode: int = 0o600
    """Permissions of a segment; clients of another user need 0o640 and a `group` that they are in."""
    group: int | None = None
    """Group id of a segment. Default: this process's, or the directory's if that hands its own down."""

    def create(self, size: int) -> Segment:
        """A new zeroed segment of `size` bytes, which are all there: no later write can fail.

        Raises Overloaded if the system has no room for it, OSError for a size or a directory that cannot be.
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

    def check(self) -> None:
        """Raises InvalidRequest if no segment can be created here, Overloaded if there is no room for any."""
        try:
            self.create(1).unlink()
        except OSError as error:
            raise InvalidRequest(
                f"no file can be created there with these permissions: {error.strerror}", field="shm_dir"
            ) from error

    def _created(self, size: int) -> Segment:
        path = self.path / f"{PREFIX}{claim(self.path)}-{secrets.token_hex(16)}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode=0o600)
        try:
            if self.group is not None:
                os.fchown(descriptor, -1, self.group)
            os.fchmod(descriptor, self.mode)  # whatever the umask is
            os.posix_fallocate(descriptor, 0, size)
            return Segment(mmap.mmap(descriptor, size, **MMAP_WITHOUT_FD), path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)

    def open(self, name: str, size: int) -> Segment:
        """Maps a segment that this project's server created, for writing."""
        if not name.startswith(PREFIX) or "/" in name:
            raise ValueError("not a segment of this project")
        path = self.path / name
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return Segment(mmap.mmap(descriptor, size, **MMAP_WITHOUT_FD), path)
        finally:
            os.close(descriptor)


def private_segment(size: int) -> Segment:
    """Zeroed memory of this process alone, in the form of a segment without a name."""
    return Segment(mmap.mmap(-1, size))


def segment_directory(path: str, mode: str, group: str) -> SegmentDirectory:
    """A SegmentDirectory as users write it: permissions in octal, the group by name, number or "" for this process's.

    Raises InvalidRequest, with the field's name, for a directory that is none, permissions that are none of MODES, or
    a group that is unknown.
    """
    if not os.path.isdir(path):
        raise InvalidRequest(f"{path!r} is not a directory", field="shm_dir")
    try:
        bits = int(mode, 8)
    except ValueError:
        raise InvalidRequest(f"{mode!r} is not a number in octal", field="shm_mode") from None
    if bits not in MODES:
        raise InvalidRequest(f"{mode!r} is not one of 600, 640 and 644", field="shm_mode")
    return SegmentDirectory(path=Path(path), mode=bits, group=_group_id(group))


def _group_id(group: str) -> int | None:
    if not group:
        return None
    try:
        number = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
        if number > MAX_GROUP_ID:
            raise KeyError
        return number
    except KeyError:
        raise InvalidRequest(f"there is no group {group!r}", field="shm_group") from None
