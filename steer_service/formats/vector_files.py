"""Reads and writes files of vectors of other projects, and converts their layers to ours.

Here layer L is the residual stream after decoder block L, counted from 0. What other projects mean by a layer:

* **gguf**, control vectors of repeng and llama.cpp: `direction.N` belongs after block N, counted from 0. llama.cpp
  has none for block 0. llama.cpp puts `direction.N` at `n_embd * (N - 1)` of a buffer (common/common.cpp,
  `common_control_vector_load_one`) from which block `il` takes what lies at `n_embd * (il - 1)` (src/llama-adapter.cpp,
  `llama_adapter_cvec::apply`). repeng finds `direction.{layer}` in `hidden_states[layer + 1]` (repeng/extract.py,
  `batched_get_hiddens`) and adds it to the output of `layers[layer]` (repeng/control.py, `ControlModel`). llama.cpp's
  own generator writes a direction found after block L as `direction.{L + 1}` (tools/cvector-generator/mean.hpp). Here
  the place where a file's vectors are added decides.
* **steering-vectors**: `layer_activations[N]` with `layer_type` "decoder_block" is added to the output of block N,
  counted from 0 (steering_vectors/steering_vector.py, `patch_activations`; layer_matching.py,
  `collect_matching_layers`). Other layer types are other places and are refused. The project has no call
  that saves. Files contain a dict of both fields, or the `SteeringVector` itself; its class is not needed to read it.
* **persona**, of persona_vectors: row R is `hidden_states[R]` (generate_vec.py, `get_hidden_p_and_r`), so row 0 is the
  embeddings and row R belongs after block R - 1, where it is added (eval/eval_persona.py, `layer_idx=layer-1`).
  The last row was read after the final norm, as that is what transformers returns there.
* **torch** and **safetensors**, `{layer: tensor}` and nothing else, are read with our convention, as steerllm did.
* **checkpoint**: our own folder, or that of steerllm; see `formats.checkpoint`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from steer_service.core.errors import InvalidRequest
from steer_service.core.specs import AddSpec, SteeringOp
from steer_service.formats.atomic_write import atomic_write
from steer_service.formats.checkpoint import read_checkpoint
from steer_service.formats.gguf_vectors import read_gguf, write_gguf
from steer_service.formats.layer_vectors import EXPECTED, Imported, Vectors, unknown_layout, vectors_by_layer
from steer_service.formats.safetensors_file import PT_METADATA, write_tensors
from steer_service.formats.torch_file import read_torch
from steer_service.formats.torch_vectors import (
    persona_from,
    plain_from,
    read_content,
    read_torch_vectors,
    steering_vectors_from,
    write_persona,
    write_plain,
    write_steering_vectors,
)


def read_vectors(path: str | Path, *, kind: str | None = None) -> Imported:
    """The vectors in a file or folder. Without `kind`, the kind is found from the name and the content.

    Raises InvalidRequest for a file of another kind, or one that would run code.
    """
    place = Path(path)
    if not place.exists():
        raise InvalidRequest(f"there is no {place.name}; {EXPECTED}", reason="NO_FILE", field="path")
    found = kind or _kind_by_name(place)
    if found is None:
        return read_torch_vectors(place)
    _check_kind(found, READERS)
    return READERS[found](place)


def write_vectors(path: str | Path, layers: Mapping[int, Any], *, kind: str, model_hint: str = "") -> None:
    """Writes the vectors of `layers`, in our convention, to a file of this kind; the file appears complete.

    `model_hint`, the model's type such as `llama`, is written if the kind has a field for it. Raises InvalidRequest for
    invalid vectors, and for layer 0 in a GGUF.
    """
    _check_kind(kind, WRITERS)
    vectors = vectors_by_layer(layers)
    with atomic_write(Path(path)) as part:
        WRITERS[kind](part, vectors, model_hint)


def _kind_by_name(path: Path) -> str | None:
    if path.is_dir():
        return "checkpoint"
    suffix = path.suffix.lower()
    if suffix in (".pt", ".pth", ".bin"):
        return None
    if suffix not in (".gguf", ".safetensors"):
        raise unknown_layout(f"{path.name} has no known ending")
    return suffix.removeprefix(".")


def _check_kind(kind: str, known: Mapping[str, Any]) -> None:
    if kind not in known:
        raise InvalidRequest(f"kind {kind!r} is not one of {', '.join(known)}", reason="UNKNOWN_KIND", field="kind")


def _read_safetensors(path: Path) -> Imported:
    from safetensors.torch import load_file

    try:
        content = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InvalidRequest(f"{path.name} is not a safetensors file", reason="BAD_TENSORS", field="path") from error
    return Imported(layers=vectors_by_layer(content), kind="safetensors")


def _write_safetensors(path: Path, vectors: Vectors, model_hint: str) -> None:
    write_tensors(path, {str(layer): vector for layer, vector in vectors.items()}, PT_METADATA)


def _read_checkpoint(path: Path) -> Imported:
    checkpoint = read_checkpoint(path)
    vectors = {}
    for layer, spec in checkpoint.spec.layers.items():
        if not all(map(_is_plain_addition, spec.operations)):
            raise InvalidRequest(
                "expected plain additions only; load_spec reads other operations",
                reason="NOT_A_VECTOR",
                field=f"layers[{layer}]",
            )
        added = [operation.materialize() for operation in spec.operations if isinstance(operation, AddSpec)]
        vectors[layer] = np.sum(added, axis=0, dtype=np.float32)
    return Imported(layers=vectors_by_layer(vectors), kind="checkpoint", model_hint=checkpoint.model.name)


def _is_plain_addition(operation: SteeringOp) -> bool:
    """True if its vector and its scale say all about it."""
    return isinstance(operation, AddSpec) and operation == AddSpec(operation.vector, operation.scale)


READERS: dict[str, Callable[[Path], Imported]] = {
    "gguf": read_gguf,
    "steering-vectors": lambda path: steering_vectors_from(read_content(path)),
    "persona": lambda path: persona_from(read_torch(path)),
    "torch": lambda path: plain_from(read_torch(path)),
    "safetensors": _read_safetensors,
    "checkpoint": _read_checkpoint,
}
"""Kind -> the function that reads it."""

WRITERS: dict[str, Callable[[Path, Vectors, str], None]] = {
    "gguf": write_gguf,
    "steering-vectors": write_steering_vectors,
    "persona": write_persona,
    "torch": write_plain,
    "safetensors": _write_safetensors,
}
"""Kind -> the function that writes (path, vectors, model hint). `save_spec` writes a checkpoint: it needs a model."""
