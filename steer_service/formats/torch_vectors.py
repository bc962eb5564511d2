"""Vectors in files of `torch.save`: `{layer: tensor}`, steering-vectors and persona vectors."""

import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from steer_service.core.errors import within
from steer_service.formats.layer_vectors import (
    BLOCK,
    Imported,
    Vectors,
    finite_vector,
    unknown_layout,
    vectors_by_layer,
)
from steer_service.formats.torch_file import read_torch


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
    """The content that `read_torch` returns; for a `SteeringVector`, its fields."""
    import torch

    with _ONE_AT_A_TIME, torch.serialization.safe_globals([SteeringVector]):
        content = read_torch(path)
    return content.fields if isinstance(content, SteeringVector) else content


def read_torch_vectors(path: Path) -> Imported:
    """The vectors in a file of any of the three layouts; its content decides which."""
    import torch

    content = read_content(path)
    if isinstance(content, torch.Tensor):
        return persona_from(content)
    if isinstance(content, Mapping) and "layer_activations" in content:
        return steering_vectors_from(content)
    if isinstance(content, Mapping):
        return plain_from(content)
    raise unknown_layout(f"the file holds a {type(content).__name__}")


def plain_from(content: Any) -> Imported:
    """The vectors of `{layer: tensor}`."""
    return Imported(layers=vectors_by_layer(content), kind="torch")


def write_plain(path: Path, vectors: Vectors, model_hint: str) -> None:
    """Writes `{layer: tensor}`."""
    import torch

    torch.save(_as_tensors(vectors), path)


def steering_vectors_from(content: Any) -> Imported:
    """The vectors of steering-vectors."""
    if not isinstance(content, Mapping) or "layer_activations" not in content:
        raise unknown_layout("the file has no layer_activations", "expected {layer_activations, layer_type}")
    layer_type = content.get("layer_type", BLOCK)
    if layer_type != BLOCK:
        raise unknown_layout(f"layer type {layer_type!r:.40} is not the residual stream", f"expected {BLOCK!r}")
    return Imported(layers=vectors_by_layer(content["layer_activations"]), kind="steering-vectors")


def write_steering_vectors(path: Path, vectors: Vectors, model_hint: str) -> None:
    """Writes the dict that steering-vectors builds a `SteeringVector` from."""
    import torch

    torch.save({"layer_activations": _as_tensors(vectors), "layer_type": BLOCK}, path)


def persona_from(content: Any) -> Imported:
    """The vectors of a persona vector; rows of zeros are left out."""
    import torch

    if not isinstance(content, torch.Tensor) or content.ndim != 2 or len(content) < 2:
        shape = list(content.shape) if isinstance(content, torch.Tensor) else type(content).__name__
        raise unknown_layout(f"the file holds {shape}", "expected a tensor of shape [layers + 1, hidden_size]")
    layers = {}
    for row in range(1, len(content)):
        with within(f"rows[{row}]"):
            layers[row - 1] = finite_vector(content[row])
    return Imported(layers={layer: vector for layer, vector in layers.items() if vector.any()}, kind="persona")


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
