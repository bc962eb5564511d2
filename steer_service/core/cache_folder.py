"""The folder of all caches: where it is, and whether this process can trust it and write to it.

Some caches are code: Numba's files are pickles, and those of vLLM, torch and Triton are machine code. Whoever can write
to such a folder can run code as the user of the server.
"""

import grp
import os
import pwd
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = "STEERLLM_CACHE"
"""Variable of the folder of all caches."""

CODE_CACHES: Mapping[str, str] = {
    "VLLM_CACHE_ROOT": "vllm",
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",
    "TRITON_CACHE_DIR": "triton",
    "NUMBA_CACHE_DIR": "numba",
}
"""A library's own variable of a cache that holds code -> the cache's name in the folder of all caches."""

LEAST_BYTES = 32 << 20
"""Free space below which no cache is begun; without the bundled model, they were 7 MiB once it was compiled."""

FOREIGN_WRITERS = "other users can write to it"


def home_folder(environment: Mapping[str, str]) -> Path:
    """The user's home folder; a path that begins with `~` if the user has none."""
    return Path(environment.get("HOME") or os.path.expanduser("~"))


def user_cache(environment: Mapping[str, str]) -> Path:
    """The user's folder of caches, as the XDG base directory specification has it."""
    given = environment.get("XDG_CACHE_HOME", "")
    return Path(given) if os.path.isabs(given) else home_folder(environment) / ".cache"


def cache_root(environment: Mapping[str, str]) -> Path:
    """The folder of all caches, whether it can be used or not."""
    given = environment.get(ROOT)
    return Path(given) if given else user_cache(environment) / "steerllm"


def code_cache(variable: str, environment: Mapping[str, str]) -> Path:
    """The folder of one of the CODE_CACHES: that of its own variable, or else one in the folder of all caches."""
    given = environment.get(variable)
    return Path(given) if given else cache_root(environment) / CODE_CACHES[variable]


def why_unusable(folder: Path, least_bytes: int = LEAST_BYTES) -> str:
    """Why no code can be cached in this folder, in a few words; "" if it can. Changes nothing.

    A folder that does not exist yet is judged by the nearest one above it.
    """
    try:
        distrusted = _why_distrusted(folder) if os.path.lexists(folder) else ""
        return distrusted or why_not_writable(folder) or _why_full(folder, least_bytes)
    except OSError as error:
        return error.strerror or str(error)


def why_not_writable(folder: Path) -> str:
    """Why no file can be written in this folder, or in the nearest one above it that exists; "" if one can."""
    if folder.parts[:1] == ("~",):
        return "the user has no home folder"
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def make_folder(folder: Path, least_bytes: int = LEAST_BYTES) -> str:
    """Makes the folder, which only this user may enter; returns why it cannot be used, "" if it can."""
    problem = why_unusable(folder, least_bytes)
    if problem:
        return problem
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        return error.strerror or str(error)
    return why_unusable(folder, least_bytes)  # another user may have made it first


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _why_full(folder: Path, least_bytes: int) -> str:
    free = shutil.disk_usage(_existing(folder)).free
    return f"{free >> 20} MiB are free, and {least_bytes >> 20} MiB are needed" if free < least_bytes else ""


def _why_distrusted(folder: Path) -> str:
    status = folder.stat()
    if status.st_uid != os.geteuid():
        return "it belongs to another user"
    if status.st_mode & stat.S_IWOTH:
        return FOREIGN_WRITERS
    if status.st_mode & stat.S_IWGRP and not _is_private(status.st_gid):
        return FOREIGN_WRITERS
    return ""


def _is_private(group: int) -> bool:
    """True for the group that many systems make for one user alone: a umask of 002 then lets nobody else write."""
    try:
        user, found = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return found.gr_name == user.pw_name and group == user.pw_gid and set(found.gr_mem) <= {user.pw_name}
