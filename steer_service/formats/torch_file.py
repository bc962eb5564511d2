"""Files that `torch.save` wrote, read as tensors alone: what would run code is refused before it runs."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steer_service.core.arrays import Float32Array, as_vector
from steer_service.core.errors import InvalidRequest, within
from steer_service.core.specs import MAX_LAYERS

UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError)
"""What `torch.load` raises for files that it cannot read, or does not want to."""

LAYER_DIGITS = len(str(MAX_LAYERS))
"""Digits of a layer at most."""


def read_torch(path: Path) -> Any:
    """What lies in the file: tensors, on the CPU, in lists and dicts with text and numbers.

    Raises InvalidRequest for anything else, of which nothing is executed.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise InvalidRequest(
            f"{path.name} is not a torch file of tensors alone; nothing in it was run",
            reason="BAD_TORCH_FILE",
            field="path",
        ) from error


def vectors_by_layer(found: Any) -> dict[int, Float32Array]:
    """The vectors of `{layer: tensor}`, in ascending order; layers are whole numbers from 0, or these as text.

    Raises InvalidRequest for anything else, vectors of different widths and numbers that are not finite included.
    """
    if not isinstance(found, Mapping) or not found:
        raise InvalidRequest(f"expected {{layer: tensor}}, got {_told(found)}", reason="UNKNOWN_LAYOUT", field="layers")
    layers = {_layer_from(key): key for key in found}
    if len(layers) < len(found):
        raise InvalidRequest("a layer stands there twice", reason="UNKNOWN_LAYOUT", field="layers")
    vectors = {}
    for layer in sorted(layers):
        with within(f"layers[{layer}]"):
            vectors[layer] = finite_vector(found[layers[layer]])
    check_same_width(vectors)
    return vectors


def finite_vector(value: Any) -> Float32Array:
    """`value`, of shape [n], as float32; raises InvalidRequest for what is not n finite numbers."""
    vector = as_vector(value)
    if not np.isfinite(vector).all():
        raise InvalidRequest("the vector contains NaN or Inf values", reason="NON_FINITE")
    return vector


def check_same_width(vectors: Mapping[int, Float32Array]) -> None:
    """Raises InvalidRequest unless all vectors have the same number of elements."""
    widths = {vector.size for vector in vectors.values()}
    if len(widths) > 1:
        raise InvalidRequest(
            f"vectors have {', '.join(map(str, sorted(widths)))} numbers, expected one width",
            reason="WRONG_WIDTH",
            field="layers",
        )


def _layer_from(key: Any) -> int:
    layer = int(key) if isinstance(key, str) and key.isdecimal() and len(key) <= LAYER_DIGITS else key
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < MAX_LAYERS:
        raise InvalidRequest(
            f"{key!r:.40} is not a layer: expected a whole number in 0..{MAX_LAYERS - 1}",
            reason="UNKNOWN_LAYOUT",
            field="layers",
        )
    return layer


def _told(found: Any) -> str:
    return "nothing" if isinstance(found, Mapping) else type(found).__name__
