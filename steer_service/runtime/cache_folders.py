"""Gives every cache of this process, and of those that it starts, a folder that can be written to.

A folder that cannot be used, or that others can write to, is replaced by one in the temporary folder. That one is
removed when this process ends. If this process is killed, the next one removes it.
"""

import os
import tempfile
import threading
from pathlib import Path

from steer_service.core.cache_folder import (
    CODE_CACHES,
    LEAST_BYTES,
    ROOT,
    cache_root,
    home_folder,
    make_folder,
    user_cache,
    why_not_writable,
)
from steer_service.core.errors import EngineFailed
from steer_service.shm.instances import create_private_folder

_temporary: Path | None = None
_choosing = threading.RLock()


def usable_cache_root(least_bytes: int = LEAST_BYTES) -> tuple[Path, str]:
    """The folder of all caches, which exists then, and why it is not the one that was asked for ("" if it is).

    `least_bytes`: the free space that is needed. Raises EngineFailed if there is no folder to write to at all.
    """
    wanted = cache_root(os.environ)
    problem = make_folder(wanted, least_bytes)
    if not problem:
        return wanted.absolute(), ""
    folder = temporary_root()
    instead = make_folder(folder, least_bytes)
    if instead:
        raise EngineFailed(
            f"no folder can take the caches: {wanted} ({problem}) and {folder} ({instead}); set {ROOT} or TMPDIR to a "
            f"writable folder with {least_bytes >> 20} MiB",
            reason="NO_WRITABLE_FOLDER",
        )
    return folder, f"{wanted} cannot be used for caches ({problem})"


def use_cache_folders() -> tuple[str, ...]:
    """Sets the variables of the libraries' caches in this process's environment, unless they have a usable folder.

    Call it before vLLM starts. Returns a sentence for each folder that cannot be used; a second call returns none.
    Raises EngineFailed if there is no folder to write to at all.
    """
    with _choosing:
        warnings = list(_use_root())
        for variable in CODE_CACHES:
            given = os.environ.get(variable, "")
            problem = make_folder(Path(given)) if given else ""
            if problem:
                os.environ[variable] = _made(temporary_root() / CODE_CACHES[variable])
                warnings.append(
                    f"{variable}: {given} cannot be used ({problem}); a temporary folder is used. Set {variable} to a "
                    "folder that this user alone can write to"
                )
        return tuple(warnings)


def temporary_root() -> Path:
    """This process's own folder for caches that have no other; raises EngineFailed if none can be made."""
    global _temporary
    with _choosing:
        if _temporary is None or not _temporary.is_dir():
            _temporary = create_private_folder(_writable_temporary_folder())
        return _temporary


def _use_root() -> list[str]:
    _writable_temporary_folder()
    unset = [variable for variable in CODE_CACHES if not os.environ.get(variable)]
    if not unset:
        return []
    root, problem = usable_cache_root()
    for variable in unset:
        os.environ[variable] = _made(root / CODE_CACHES[variable])
    _use_settings_folders(root)
    remedy = f"Set {ROOT} to a folder that this user alone can write to"
    return [f"{problem}: a temporary folder is used, and the next start compiles again. {remedy}"] if problem else []


def _use_settings_folders(root: Path) -> None:
    """Libraries that keep settings or models in the home folder, where that cannot be written to."""
    configuration = Path(os.environ.get("XDG_CONFIG_HOME") or home_folder(os.environ) / ".config")
    if not os.environ.get("MPLCONFIGDIR") and why_not_writable(configuration / "matplotlib"):
        os.environ["MPLCONFIGDIR"] = _made(root / "matplotlib")
    models = user_cache(os.environ) / "huggingface"
    if not os.environ.get("HF_HOME") and not os.path.isdir(models) and why_not_writable(models):
        os.environ["HF_HOME"] = _made(root / "huggingface")


def _made(folder: Path) -> str:
    """The path of a folder that is in a usable one; if it is not usable itself, that of one in the temporary folder."""
    problem = make_folder(folder, 0)
    if problem:
        folder = temporary_root() / folder.name
        folder.mkdir(mode=0o700, exist_ok=True)
    return str(folder)


def _writable_temporary_folder() -> Path:
    """Where temporary files go; raises EngineFailed if no folder for them can be written to."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise EngineFailed(
            "no temporary folder can be written to, and vLLM's processes need one for their sockets: set TMPDIR to a "
            "writable folder, or mount one at /tmp",
            reason="NO_WRITABLE_FOLDER",
        ) from error
