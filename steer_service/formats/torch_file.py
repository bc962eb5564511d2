"""Files that `torch.save` wrote, read as tensors only. A file that would run code is refused before it runs."""

import pickle
import struct
from pathlib import Path
from typing import Any

from steer_service.core.errors import InvalidRequest, Unsupported

UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, OverflowError, MemoryError, struct.error,
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
            if is_mapped and is_archive and path.suffix != ".safetensors":
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
