"""The processes that own the segments in a directory, so that segments of dead processes can be removed.

A process that creates segments in a directory first creates and locks a lock file there. Its segments and its lock file
have the same instance in their names. If the lock can be taken, the process is dead, in any PID namespace. Its segments
are then removed; no other file is. Private folders are owned and removed in the same way.

The locks are POSIX record locks, not `flock`, because they belong to the process alone. Forked processes, such as
vLLM's, inherit the descriptors and would keep an flock after the death of their parent.
"""

import atexit
import fcntl
import logging
import os
import re
import secrets
import shutil
import stat
import struct
import threading
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

PREFIX = "steerllm-"
"""Prefix of every name of a segment or a private folder: `steerllm-<instance>-<random>`."""

PRIVATE_FOLDER = f"{PREFIX}0123456789abcdef-01234567"
"""A name of a private folder; all have this length."""

_FLOCK = "hhqqi"
"""Linux's `struct flock` on 64 bits: type, whence, start, length and process."""

_LOCK_NAME = re.compile(r"steerllm\.([0-9a-f]{16})\.lock")

# directory -> (instance, descriptor of its lock file), of this process. Closing a second descriptor of the same file
# would release the lock, so `sweep` and `claim` exclude each other.
_claims: dict[Path, tuple[str, int]] = {}
_claiming = threading.RLock()


def claim(directory: Path) -> str:
    """This process's instance in `directory`; the first call creates it and removes segments of dead processes.

    Raises OSError if no file can be created or locked there. A failure to remove segments is only logged.
    """
    place = directory.resolve()
    with _claiming:
        if place not in _claims:
            _claims[place] = _locked_instance(place)
            atexit.register(_leave, place)
            _sweep_and_log(place)
        return _claims[place][0]


def leave_all() -> None:
    """Removes this process's segments and lock files, in a process that ends without its exit handlers."""
    for directory in list(_claims):
        _leave(directory)


def sweep(directory: Path) -> int:
    """Removes the segments and private folders of dead processes; returns the number removed.

    Removes only what belongs to this user and to an instance whose lock could be taken. Segments of an instance without
    a lock file are kept. Raises OSError if the directory cannot be read.
    """
    removed = 0
    with _claiming:
        mine = {instance for instance, _ in _claims.values()}
        for entry in list(os.scandir(directory)):
            named = _LOCK_NAME.fullmatch(entry.name)
            if named is not None and named[1] not in mine:
                with suppress(OSError):  # removed meanwhile, or not readable
                    removed += _remove_if_dead(directory, named[1])
    return removed


def orphans(directory: Path) -> list[Path]:
    """What `sweep` would remove, without the lock files; nothing is changed.

    Raises OSError if the directory cannot be read.
    """
    found: list[Path] = []
    with _claiming:
        mine = {instance for instance, _ in _claims.values()}
        entries = list(os.scandir(directory))
        for entry in entries:
            named = _LOCK_NAME.fullmatch(entry.name)
            if named is not None and named[1] not in mine and _is_dead(Path(entry.path)):
                found += [Path(other.path) for other in entries if _is_of(other, named[1])]
    return found


def create_private_folder(directory: Path) -> Path:
    """A new folder in `directory` that only this user may enter.

    It is removed like a segment: when this process exits, or by another process if this one is killed.
    """
    path = directory / f"{PREFIX}{claim(directory)}-{secrets.token_hex(4)}"
    path.mkdir(mode=0o700)
    return path


def lock_path(directory: Path, instance: str) -> Path:
    """The path of the lock file of an instance."""
    return directory / f"steerllm.{instance}.lock"


def _locked_instance(directory: Path) -> tuple[str, int]:
    while True:
        instance = secrets.token_hex(8)
        path = lock_path(directory, instance)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if _lock(descriptor) and _is_at(path, descriptor):
                return instance, descriptor
        except BaseException:
            with suppress(OSError):
                os.unlink(path)
            os.close(descriptor)
            raise
        os.close(descriptor)  # another process's sweep took the lock first, as if this process were dead


def _lock(descriptor: int) -> bool:
    """Takes the lock; False if another process has it."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows either
        return False
    return True


def _is_dead(lock: Path) -> bool:
    """True if this user has the lock file and no process has its lock, which is asked for and not taken."""
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # removed meanwhile, or of another user
        return False
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return False
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
        return bool(answer[0] == fcntl.F_UNLCK)
    finally:
        os.close(descriptor)


def _sweep_and_log(directory: Path) -> None:
    try:
        removed = sweep(directory)
    except OSError as error:
        logger.warning("cannot search for files of servers that died: %s", error.strerror)
        return
    if removed:
        logger.warning("removed %d files and folders of servers that died", removed)


def _remove_if_dead(directory: Path, instance: str) -> int:
    path = lock_path(directory, instance)
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return 0
        if not _lock(descriptor) or not _is_at(
            path, descriptor
        ):  # its process is alive, or another sweep took the lock
            return 0
        removed = _remove_segments(directory, instance)
        os.unlink(path)
        return removed
    finally:
        os.close(descriptor)


def _remove_segments(directory: Path, instance: str) -> int:
    return sum(_removed(entry) for entry in list(os.scandir(directory)) if _is_of(entry, instance))


def _is_of(entry: "os.DirEntry[str]", instance: str) -> bool:
    return entry.name.startswith(f"{PREFIX}{instance}-") and not entry.is_symlink()


def _removed(entry: "os.DirEntry[str]") -> bool:
    with suppress(FileNotFoundError):
        status = entry.stat(follow_symlinks=False)
        if status.st_uid == os.geteuid() and stat.S_ISREG(status.st_mode):
            os.unlink(entry.path)
            return True
        if status.st_uid == os.geteuid() and stat.S_ISDIR(status.st_mode):
            shutil.rmtree(entry.path, ignore_errors=True)  # follows no symbolic link
            return not os.path.lexists(entry.path)
    return False


def _is_at(path: Path, descriptor: int) -> bool:
    """True if the opened file still has that path."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _leave(directory: Path) -> None:
    """Removes this process's segments and lock file when it exits: nothing writes or releases them afterwards."""
    with _claiming:
        claimed = _claims.pop(directory, None)
        if claimed is not None:
            with suppress(OSError):
                _remove_segments(directory, claimed[0])
                os.unlink(lock_path(directory, claimed[0]))


def _forget() -> None:
    """Drops the claims in a forked process: it has no locks of its parent and must not remove its segments."""
    global _claiming
    _claiming = threading.RLock()
    _claims.clear()


os.register_at_fork(after_in_child=_forget)
