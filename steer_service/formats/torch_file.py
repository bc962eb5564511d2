"""Files that `torch.save` wrote, read as tensors only. A file that would run code is refused before it runs."""

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

from steer_service.core.errors import InvalidRequest, Unsupported
from steer_service.formats.zip_entries import check_growth

UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, OverflowError, MemoryError, struct.error, zipfile.BadZipFile,
)  # fmt: skip
"""What `torch.load` raises for files that it cannot read or refuses."""


def read_torch(path: Path, *, is_mapped: bool = False) -> Any:
    """The content of the file: tensors, on the CPU, in lists and dicts with text and numbers.

    `is_mapped` reads the numbers of a tensor when they are needed, where the file allows it. Raises InvalidRequest for
    anything else, of which nothing is executed, and Unsupported without torch.
    """
    try:
        import torch
    except ImportError as error:
        raise Unsupported(
            f"{path.name} is a torch file, and torch is not installed: pip install torch",
            reason="NO_TORCH",
            field="path",
        ) from error
    try:
        with path.open("rb") as file:
            is_archive = file.read(2) == b"PK"
            # Older files cannot be mapped, and newer versions of torch read a .safetensors by its name.
            is_mapped = is_mapped and is_archive and path.suffix != ".safetensors"
            # torch maps the bytes of an entry as they are: compressed ones would be other numbers.
            if is_archive and _is_compressed(path):
                is_mapped = False
            if is_mapped:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise InvalidRequest(
            f"{path.name} is not a torch file of tensors only; nothing in it was run. If you trust it, load it with "
            'the project that wrote it and save the vector: numpy.save("layer_13.npy", vector)',
            reason="BAD_TORCH_FILE",
            field="path",
        ) from error


def _is_compressed(path: Path) -> bool:
    """True if an entry of the archive is compressed; raises ValueError if one grows too much."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    for entry in entries:
        check_growth(entry)
    return any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
