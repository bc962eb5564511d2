"""Reading a file that a person wrote."""

import errno
from pathlib import Path

MOST_BYTES = 4 << 20
"""Bytes of the largest certificate, token file or chat template."""


def read_small(path: str | Path) -> bytes:
    """The content of a file, also of a pipe; raises OSError (EFBIG) for one that is larger, such as /dev/zero."""
    with open(path, "rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise OSError(errno.EFBIG, f"it is larger than {MOST_BYTES} bytes", str(path))
    return data
