"""Files that `torch.save` wrote, read as tensors only. A file that would run code is refused before it runs."""

import pickle
from pathlib import Path
from typing import Any

from steer_service.core.errors import InvalidRequest

UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError)
"""What `torch.load` raises for files that it cannot read or refuses."""


def read_torch(path: Path) -> Any:
    """The content of the file: tensors, on the CPU, in lists and dicts with text and numbers.

    Raises InvalidRequest for anything else, of which nothing is executed.
    """
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise InvalidRequest(
            f"{path.name} is not a torch file of tensors only; nothing in it was run",
            reason="BAD_TORCH_FILE",
            field="path",
        ) from error
