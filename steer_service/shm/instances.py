"""Whose segments lie in a directory, and which of them belong to nobody any more.

A process that creates segments in a directory first creates a lock file there and locks it; the names of its segments
begin with the instance that the lock file is named after. A lock that can be taken belongs to a process that is dead,
in whatever PID namespace it ran. What it left behind is then removed, and nothing else ever is.

POSIX record locks, and not `flock`: they belong to the process alone. Processes forked from it, as vLLM's are, inherit
its descriptors, and would keep an flock after its death.
"""

import atexit
import fcntl
import logging
import os
import re
import secrets
import stat
import threading
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

PREFIX = "steerllm-"
"""Every segment's name begins so: `steerllm-<instance>-<random>`."""

_LOCK_NAME = re.compile(r"steerllm\.([0-9a-f]{16})\.lock")

# (process, directory) -> (instance, descriptor of its lock). The lock is the process's, so its record is as well:
# a second descriptor of the same file must never be closed in it, for that would give up the lock.
_claims: dict[tuple[int, Path], tuple[str, int]] = {}
_claiming = threading.Lock()


def claim(directory: Path) -> str:
    """This process's instance in `directory`; the first call makes it, and removes what dead processes left there."""
    key = os.getpid(), directory.resolve()
    with _claiming:
        if key not in _claims:
            _claims[key] = _locked_instance(directory)
            atexit.register(_leave, key)
            removed = sweep(directory)
            if removed:
                logger.warning("removed %d shared-memory segments of servers that died", removed)
        return _claims[key][0]


def sweep(directory: Path) -> int:
    """Removes the segments of dead processes; returns how many.

    Only plain files of this user are looked at, and only those whose names begin with an instance whose lock could be
    taken. Segments of an instance without a lock file are left alone.
    """
    mine = {instance for (process, _), (instance, _) in _claims.items() if process == os.getpid()}
    removed = 0
    for entry in list(os.scandir(directory)):
        named = _LOCK_NAME.fullmatch(entry.name)
        if named is not None and named[1] not in mine:
            with suppress(OSError):  # gone meanwhile, or not ours to open
                removed += _remove_if_dead(directory, named[1])
    return removed


def lock_path(directory: Path, instance: str) -> Path:
    """The lock file of an instance."""
    return directory / f"steerllm.{instance}.lock"


def _locked_instance(directory: Path) -> tuple[str, int]:
    while True:
        instance = secrets.token_hex(8)
        path = lock_path(directory, instance)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                return instance, descriptor
        except OSError:  # another process's sweep was quicker: it takes the new file for a dead one's
            pass
        os.close(descriptor)


def _remove_if_dead(directory: Path, instance: str) -> int:
    path = lock_path(directory, instance)
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return 0
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: its process lives
        if not _is_at(path, descriptor):
            return 0
        removed = sum(_removed(entry) for entry in list(os.scandir(directory)) if _is_of(entry, instance))
        os.unlink(path)
        return removed
    finally:
        os.close(descriptor)


def _is_of(entry: "os.DirEntry[str]", instance: str) -> bool:
    return entry.name.startswith(f"{PREFIX}{instance}-") and entry.is_file(follow_symlinks=False)


def _removed(entry: "os.DirEntry[str]") -> bool:
    with suppress(FileNotFoundError):
        if entry.stat(follow_symlinks=False).st_uid == os.geteuid():
            os.unlink(entry.path)
            return True
    return False


def _is_at(path: Path, descriptor: int) -> bool:
    """True if the file that was opened still has that name."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _leave(key: tuple[int, Path]) -> None:
    """Removes the lock file when its process ends in order, and has left nothing."""
    if key[0] != os.getpid():
        return
    instance, _ = _claims[key]
    with suppress(OSError):
        if not any(_is_of(entry, instance) for entry in os.scandir(key[1])):
            os.unlink(lock_path(key[1], instance))
