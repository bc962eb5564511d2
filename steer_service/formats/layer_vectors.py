"""Vectors by layer, the result of reading any file of vectors, and what the layers of each kind of file mean."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from steer_service.core.arrays import Float32Array, as_vector
from steer_service.core.errors import InvalidRequest, within
from steer_service.core.number_limits import MAX_LAYERS
from steer_service.core.specs import AddSpec, LayerSteeringSpec, SteeringOp, SteeringSpec

BLOCK = "decoder_block"
"""The layer type of steering-vectors for the residual stream after a block."""

AFTER_BLOCK = "N is the residual stream after decoder block N, counted from 0"

TRAINED = "trained-steering"
"""The kind of a folder that `steer train` or `save_steering` wrote."""

CONVENTIONS = {
    "gguf": f"direction.{AFTER_BLOCK}, as in repeng and llama.cpp",
    "steering-vectors": f"layer_activations[N] with layer type {BLOCK}: {AFTER_BLOCK}",
    "persona": "row R is hidden_states[R], the stream after block R - 1; row 0, the embeddings, is left out",
    "rows": f"row {AFTER_BLOCK}",
    "vector": f"one vector; layer {AFTER_BLOCK}",
    "assistant-axis": f"row {AFTER_BLOCK}, as assistant-axis adds it",
    "capping": f"a cap on the projection onto each direction; layer {AFTER_BLOCK}, as in assistant-axis",
    "lm-eval": f"additions and clamps at the output of layers.N: {AFTER_BLOCK}",
    "refusal-direction": "index I of refusal_direction is the input of block I, which is the stream after block I - 1",
    "vllm-lens": f"layer_indices: {AFTER_BLOCK}",
    "sae": "a feature of a sparse autoencoder's decoder; blocks.N.hook_resid_pre is after block N - 1",
    "torch": f"not stated in the file; assumed: layer {AFTER_BLOCK}",
    "safetensors": f"not stated in the file; assumed: layer {AFTER_BLOCK}",
    "numpy": f"not stated in the file; assumed: layer {AFTER_BLOCK}",
    "json": f"not stated in the file; assumed: layer {AFTER_BLOCK}",
    TRAINED: f"layer {AFTER_BLOCK}",
}
"""Kind of file -> what its layers mean."""

ALIASES = {"checkpoint": TRAINED}
"""Another name of a kind -> the kind."""

LAYER_DIGITS = len(str(MAX_LAYERS))
"""Most digits of a layer."""

Vectors = Mapping[int, Float32Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """Steering that was read from a file."""

    layers: Vectors
    """Layer, in our convention -> its vector, float32, shape [hidden_size], of the length it has in the file.

    Empty for a file of operations.
    """
    operations: Mapping[int, tuple[SteeringOp, ...]] | None = None
    """Layer -> its operations in their order, for a file that holds more than vectors; None for vectors."""
    kind: str
    """Kind of the file, such as `gguf`."""
    model_hint: str = ""
    """The model that the file names, such as `llama`; "" if none."""
    found: str = ""
    """Where the layers were found, or what was chosen, for people; "" if the kind says all."""

    @property
    def convention(self) -> str:
        """One sentence: the convention for layers, and where they were found."""
        return f"{CONVENTIONS[self.kind]} ({self.found})" if self.found else CONVENTIONS[self.kind]

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        """The layers that it steers, ascending."""
        return tuple(self.layers if self.operations is None else self.operations)

    def at_layers(self, chosen: Iterable[int]) -> "Imported":
        """The part at these layers; raises InvalidRequest for one that it does not have."""
        chosen = tuple(chosen)
        for layer in chosen:
            if layer not in self.layer_numbers:
                raise InvalidRequest(f"there is no vector for layer {layer}", reason="UNKNOWN_LAYER", field="layers")
        if self.operations is None:
            return replace(self, layers={layer: self.layers[layer] for layer in chosen})
        return replace(self, operations={layer: self.operations[layer] for layer in chosen})

    def to_spec(self, scale: float = 1.0) -> SteeringSpec:
        """A spec that adds `scale` times each vector after its layer; vectors of zeros are left out.

        For a file of operations it is these operations. Raises InvalidRequest if they are not additions only and
        `scale` is not 1: caps and ablations have no scale of this kind.
        """
        if self.operations is None:
            return spec_of_additions(self.layers, scale)
        layers = {}
        for layer, operations in self.operations.items():
            with within(f"layers[{layer}]"):
                layers[layer] = LayerSteeringSpec(tuple(_scaled(one, scale) for one in operations))
        return SteeringSpec(layers)


def _scaled(operation: SteeringOp, scale: float) -> SteeringOp:
    if isinstance(operation, AddSpec):
        return replace(operation, scale=operation.scale * scale)
    if scale != 1.0:
        raise InvalidRequest(
            f"scale {scale:g} is for additions, and the file has a cap here; expected 1",
            reason="NOT_A_VECTOR",
            field="scale",
        )
    return operation


def spec_of_additions(vectors: Mapping[int, Float32Array], scale: float = 1.0) -> SteeringSpec:
    """A spec that adds `scale` times each layer's vector; vectors of zeros are left out."""
    layers = {}
    for layer, vector in vectors.items():
        if vector.any():
            with within(f"layers[{layer}]"):
                layers[layer] = LayerSteeringSpec((AddSpec.from_unnormalized(vector, scale),))
    return SteeringSpec(layers)


def unknown_layout(found: str, expected: str) -> InvalidRequest:
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
