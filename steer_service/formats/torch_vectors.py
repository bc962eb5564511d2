"""Files of `torch.save`: their content as a tree of arrays, and the layouts of vectors that are written."""

import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from steer_service.formats.layer_vectors import BLOCK, Vectors
from steer_service.formats.layouts.stored_array import StoredArray, Tree
from steer_service.formats.torch_file import UNREADABLE, read_torch


class SteeringVector:
    """Takes the place of the class of that name in files of steering-vectors, whose code is never run.

    Relies on (steering-vectors 0.12): an ordinary dataclass, whose pickle holds its fields; (torch 2.5) `safe_globals`
    finds a class by its `__module__` and name. `test_peers.py` notices.
    """

    __module__ = "steering_vectors.steering_vector"
    fields: Mapping[str, Any] = MappingProxyType({})

    def __setstate__(self, fields: Any) -> None:
        if not isinstance(fields, Mapping):
            raise ValueError("the fields are not a dict")
        self.fields = fields


_ONE_AT_A_TIME = threading.Lock()
"""torch keeps its list of safe classes once per process."""


def read_content(path: Path) -> Any:
    """The content of the file as `Tree` converts it; for a `SteeringVector`, its fields."""
    content = _loaded(path)
    return Tree(_stored_tensor).convert(content.fields if isinstance(content, SteeringVector) else content)


def _loaded(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        return read_torch(path)  # which refuses it
    with _ONE_AT_A_TIME, torch.serialization.safe_globals([SteeringVector]):
        return read_torch(path, is_mapped=True)


def _stored_tensor(value: Any) -> Any:
    """A tensor as a StoredArray that copies nothing; anything else as it is."""
    import torch

    if not isinstance(value, torch.Tensor):
        return value
    try:
        shape = tuple(int(size) for size in value.shape)
    except UNREADABLE:  # of a nested tensor
        return None
    return StoredArray(shape=shape, dtype=str(value.dtype).removeprefix("torch."), read=lambda index: value[index])


def write_plain(path: Path, vectors: Vectors, model_hint: str) -> None:
    """Writes `{layer: tensor}`."""
    import torch

    torch.save(_as_tensors(vectors), path)


def write_steering_vectors(path: Path, vectors: Vectors, model_hint: str) -> None:
    """Writes the dict that steering-vectors builds a `SteeringVector` from."""
    import torch

    torch.save({"layer_activations": _as_tensors(vectors), "layer_type": BLOCK}, path)


def write_persona(path: Path, vectors: Vectors, model_hint: str) -> None:
    """Writes rows up to the highest layer. Rows of the embeddings and of layers without a vector are zeros."""
    import torch

    hidden_size = next(iter(vectors.values())).size
    rows = torch.zeros(max(vectors) + 2, hidden_size)
    for layer, vector in _as_tensors(vectors).items():
        rows[layer + 1] = vector
    torch.save(rows, path)


def _as_tensors(vectors: Vectors) -> dict[int, Any]:
    import torch

    return {layer: torch.from_numpy(vector.copy()) for layer, vector in vectors.items()}
