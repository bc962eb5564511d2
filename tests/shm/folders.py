"""What lies in a directory of segments."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from steer_service.shm.segments import PREFIX


def segments_in(folder: Path) -> list[str]:
    """Names of the segments of whatever process."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(PREFIX))


def locks_in(folder: Path) -> list[str]:
    """Names of the lock files of whatever process."""
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(".lock"))


@contextmanager
def no_more_files(but: int = 0) -> Iterator[None]:
    """This process can open nothing inside, or at most `but` files."""
    lowest_free = os.dup(0)
    os.close(lowest_free)
    with open_files_limit(lowest_free + but):
        yield


@contextmanager
def open_files_limit(count: int) -> Iterator[None]:
    """Lowers the limit that this process may raise again; afterwards it is what it was."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
