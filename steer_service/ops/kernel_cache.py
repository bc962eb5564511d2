"""Where the compiled CPU kernel is kept, so that the next start does not compile it again."""

import hashlib
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from steer_service.core.cache_folder import ROOT, code_cache, make_folder

logger = logging.getLogger(__name__)

VARIABLE = "NUMBA_CACHE_DIR"
"""Numba's own variable of the folder of compiled functions."""

Kernel = TypeVar("Kernel")


def from_cache(compile_in: Callable[[Path | None], Kernel], sources: tuple[ModuleType, ...]) -> Kernel:
    """The kernel that `compile_in` finds in a folder or compiles and keeps there; with None it keeps nothing.

    `sources`: the modules that the kernel is compiled from. A folder that cannot be used, and damaged files, cost the
    time of a compilation and nothing else.
    """
    base = code_cache(VARIABLE, os.environ)
    folder = base / f"steer-{_digest_of(sources)}"
    problem = make_folder(base) or make_folder(folder)
    if problem:
        logger.warning(
            "the CPU kernel is compiled without a cache, at each start: %s cannot be used (%s); set %s or %s to a "
            "folder that this user alone can write to",
            *(base, problem, ROOT, VARIABLE),
        )
        return compile_in(None)
    try:
        return compile_in(folder)
    except Exception as error:  # Numba unpickles what it finds: a damaged file can raise anything
        logger.warning("the CPU kernel is compiled again, since its cache is damaged: %s (%r)", folder, error)
    for path in folder.glob("*/*.nb[ic]"):
        with suppress(OSError):
            path.unlink()
    try:
        return compile_in(folder)
    except OSError as error:
        logger.warning("the compiled CPU kernel cannot be kept in %s: %s", folder, error.strerror or error)
        return compile_in(None)


def _digest_of(sources: tuple[ModuleType, ...]) -> str:
    """A number of the source text: Numba itself looks at the time and size of one file only."""
    digest = hashlib.sha256()
    for module in sources:
        assert module.__file__ is not None, "a module of this project is a file"
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()[:16]
