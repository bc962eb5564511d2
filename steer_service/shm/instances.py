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

# directory -> (instance, descriptor of its lock), of this process. A second descriptor of the same file must never be
# closed in it, for that would give up the lock: nothing sweeps while something claims.
_claims: dict[Path, tuple[str, int]] = {}
_claiming = threading.RLock()


def claim(directory: Path) -> str:
    """This process's instance in `directory`; the first call makes it, and removes what dead processes left there.

    Raises OSError if no file can be created or locked there; that there is no removing is logged only.
    """
    place = directory.resolve()
    with _claiming:
        if place not in _claims:
            _claims[place] = _locked_instance(place)
            atexit.register(_leave, place)
            _sweep_and_tell(place)
        return _claims[place][0]


def sweep(directory: Path) -> int:
    """Removes the segments of dead processes; returns how many.

    Only plain files of this user are looked at, and only those whose names begin with an instance whose lock could be
    taken. Segments of an instance without a lock file are left alone.
    """
    removed = 0
    with _claiming:
        mine = {instance for instance, _ in _claims.values()}
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
            if _lock(descriptor) and _is_at(path, descriptor):
                return instance, descriptor
        except BaseException:
            with suppress(OSError):
                os.unlink(path)
            os.close(descriptor)
            raise
        os.close(descriptor)  # another process's sweep was quicker: it takes the new file for a dead one's


def _lock(descriptor: int) -> bool:
    """True once this process has the lock, False if another has it."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows either
        return False
    return True


def _sweep_and_tell(directory: Path) -> None:
    try:
        removed = sweep(directory)
    except OSError as error:
        logger.warning("cannot look for shared-memory segments of servers that died: %s", error.strerror)
        return
    if removed:
        logger.warning("removed %d shared-memory segments of servers that died", removed)


def _remove_if_dead(directory: Path, instance: str) -> int:
    path = lock_path(directory, instance)
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return 0
        if not _lock(descriptor) or not _is_at(path, descriptor):  # its process lives, or another sweep was quicker
            return 0
        removed = _remove_segments(directory, instance)
        os.unlink(path)
        return removed
    finally:
        os.close(descriptor)


def _remove_segments(directory: Path, instance: str) -> int:
    return sum(_removed(entry) for entry in list(os.scandir(directory)) if _is_of(entry, instance))


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


def _leave(directory: Path) -> None:
    """Removes this process's segments and lock file: it ends in order, and nobody will write or release them."""
    with _claiming:
        claimed = _claims.pop(directory, None)
        if claimed is not None:
            with suppress(OSError):
                _remove_segments(directory, claimed[0])
                os.unlink(lock_path(directory, claimed[0]))


def _forget() -> None:
    """A forked process has none of its parent's locks, and must remove nothing of its parent's."""
    global _claiming
    _claiming = threading.RLock()
    _claims.clear()


os.register_at_fork(after_in_child=_forget)
