"""Vectors by layer, the result of reading any file of vectors, and what the layers of each kind of file mean."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from steer_service.core.arrays import Float32Array, as_vector
from steer_service.core.errors import InvalidRequest, within
from steer_service.core.number_limits import MAX_LAYERS
from steer_service.core.specs import AddSpec, LayerSteeringSpec, SteeringSpec

BLOCK = "decoder_block"
"""The layer type of steering-vectors for the residual stream after a block."""

AFTER_BLOCK = "N is the residual stream after decoder block N, counted from 0"

CONVENTIONS = {
    "gguf": f"direction.{AFTER_BLOCK}, as in repeng and llama.cpp",
    "steering-vectors": f"layer_activations[N] with layer type {BLOCK}: {AFTER_BLOCK}",
    "persona": "row R is hidden_states[R], the stream after block R - 1; row 0, the embeddings, is left out",
    "torch": f"not stated in the file; assumed: layer {AFTER_BLOCK}",
    "safetensors": f"not stated in the file; assumed: layer {AFTER_BLOCK}",
    "checkpoint": f"layer {AFTER_BLOCK}",
}
"""Kind of file -> what its layers mean."""

EXPECTED = (
    "expected a control vector (.gguf), {layer: tensor} (.pt or .safetensors), a file of steering-vectors or persona "
    "vectors (.pt), or a folder with steering.json"
)

LAYER_DIGITS = len(str(MAX_LAYERS))
"""Most digits of a layer."""

Vectors = Mapping[int, Float32Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """Vectors that were read from a file."""

    layers: Vectors
    """Layer, in our convention -> its vector, float32, shape [hidden_size], of the length it has in the file."""
    kind: str
    """A key of `CONVENTIONS`."""
    model_hint: str = ""
    """The model that the file names, such as `llama`; "" if none."""

    @property
    def convention(self) -> str:
        """One sentence: the convention for layers."""
        return CONVENTIONS[self.kind]

    def to_spec(self, scale: float = 1.0) -> SteeringSpec:
        """A spec that adds `scale` times each vector after its layer; vectors of zeros are left out."""
        return spec_of_additions(self.layers, scale)


def spec_of_additions(vectors: Mapping[int, Float32Array], scale: float = 1.0) -> SteeringSpec:
    """A spec that adds `scale` times each layer's vector; vectors of zeros are left out."""
    layers = {}
    for layer, vector in vectors.items():
        if vector.any():
            with within(f"layers[{layer}]"):
                layers[layer] = LayerSteeringSpec((AddSpec.from_unnormalized(vector, scale),))
    return SteeringSpec(layers)


def unknown_layout(found: str, expected: str = EXPECTED) -> InvalidRequest:
    """The error for a file that holds something else than vectors; `found` is what it holds."""
    return InvalidRequest(f"{found}; {expected}", reason="UNKNOWN_LAYOUT", field="path")


def vectors_by_layer(found: Any) -> dict[int, Float32Array]:
    """The vectors of `{layer: tensor}`, in ascending order; layers are whole numbers from 0, or these as text.

    Raises InvalidRequest for anything else, including vectors of different sizes and numbers that are not finite.
    """
    if not isinstance(found, Mapping) or not found:
        raise InvalidRequest(
            f"expected {{layer: tensor}}, got {_described(found)}", reason="UNKNOWN_LAYOUT", field="layers"
        )
    layers = {_layer_from(key): key for key in found}
    if len(layers) < len(found):
        raise InvalidRequest("a layer is there twice", reason="UNKNOWN_LAYOUT", field="layers")
    vectors = {}
    for layer in sorted(layers):
        with within(f"layers[{layer}]"):
            vectors[layer] = finite_vector(found[layers[layer]])
    check_same_size(vectors)
    return vectors


def finite_vector(value: Any) -> Float32Array:
    """`value`, of shape [n], as float32; raises InvalidRequest for what is not n finite numbers."""
    vector = as_vector(value)
    if not np.isfinite(vector).all():
        raise InvalidRequest("the vector contains NaN or Inf values", reason="NON_FINITE")
    return vector


def check_same_size(vectors: Mapping[int, Float32Array]) -> None:
    """Raises InvalidRequest unless all vectors have the same number of elements."""
    sizes = {vector.size for vector in vectors.values()}
    if len(sizes) > 1:
        raise InvalidRequest(
            f"vectors have {', '.join(map(str, sorted(sizes)))} numbers, expected one hidden size",
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


def _described(found: Any) -> str:
    return "nothing" if isinstance(found, Mapping) else type(found).__name__
