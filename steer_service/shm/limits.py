"""How many files this process may have open: before Python 3.13 every mapped segment keeps one."""

import resource
from contextlib import suppress


def raise_open_files_limit() -> None:
    """Raises the limit to what the system allows this process; those that it starts from now on inherit it.

    Where the kernel allows less than it says, the limit stays.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
