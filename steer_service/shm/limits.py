"""The limit of open files: before Python 3.13 every mapped segment keeps a file open."""

import resource
from contextlib import suppress


def raise_open_files_limit() -> None:
    """Raises this process's limit of open files to its hard limit; processes that it starts later inherit it.

    If the kernel refuses that, the limit stays as it is.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
