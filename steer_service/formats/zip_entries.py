"""The entries of archives, of .npz and of `torch.save`: a small one may claim to fill the memory."""

import zipfile

BOMB_BYTES = 1 << 26
BOMB_RATIO = 100
"""An entry may have this many bytes, or at most so many times what it has in the file."""


def check_growth(entry: zipfile.ZipInfo) -> None:
    """Raises ValueError for an entry that grows too much when it is read."""
    if entry.file_size > max(BOMB_BYTES, BOMB_RATIO * entry.compress_size):
        raise ValueError(f"{entry.filename} would have {entry.file_size} bytes")
