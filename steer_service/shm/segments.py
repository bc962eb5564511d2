"""Shared-memory segments: created by the server under unguessable names, opened by its workers.

`multiprocessing.shared_memory` is not used: before Python 3.13 its tracker deletes segments that others still use.
"""

import mmap
import os
import secrets
from contextlib import suppress
from pathlib import Path

DEFAULT_DIRECTORY = Path("/dev/shm")
PREFIX = "steerllm-"
"""Every segment's name starts so; nothing else in the directory is ever touched."""


class Segment:
    """One mapped segment; whoever created it unlinks it."""

    def __init__(self, directory: Path, name: str, memory: mmap.mmap) -> None:
        self.name = name
        """File name within the directory."""
        self.memory = memory
        """The mapping; lives until the last array over it is gone."""
        self._directory = directory

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.memory)

    def unlink(self) -> None:
        """Removes the name; mappings stay valid. A name that is gone already is no error."""
        with suppress(FileNotFoundError):
            os.unlink(self._directory / self.name)


def create_segment(size: int, directory: Path = DEFAULT_DIRECTORY) -> Segment:
    """A new zeroed segment of `size` bytes, mode 0600; raises OSError (ENOSPC) rather than fail at a later write."""
    name = PREFIX + secrets.token_hex(16)
    descriptor = os.open(
        directory / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode=0o600
    )
    try:
        os.posix_fallocate(descriptor, 0, size)
        return Segment(directory, name, mmap.mmap(descriptor, size))
    except BaseException:
        os.unlink(directory / name)
        raise
    finally:
        os.close(descriptor)


def open_segment(name: str, size: int, directory: Path = DEFAULT_DIRECTORY) -> Segment:
    """Maps a segment that this project's server created, for writing."""
    if not name.startswith(PREFIX) or "/" in name:
        raise ValueError("not a segment of this project")
    descriptor = os.open(directory / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return Segment(directory, name, mmap.mmap(descriptor, size))
    finally:
        os.close(descriptor)
