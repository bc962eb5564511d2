"""Vectors in the files that other projects write, read into and written from our layers.

Here layer L is the residual stream after decoder block L, counted from 0. What others mean by a layer:

* **gguf**, control vectors of repeng and llama.cpp: `direction.N` belongs behind block N, counted from 0; llama.cpp has
  none for block 0. llama.cpp puts `direction.N` at `n_embd * (N - 1)` of a buffer (common/common.cpp,
  `common_control_vector_load_one`) from which block `il` takes what lies at `n_embd * (il - 1)` (src/llama-adapter.cpp,
  `llama_adapter_cvec::apply`). repeng finds `direction.{layer}` in `hidden_states[layer + 1]` (repeng/extract.py,
  `batched_get_hiddens`) and adds it to the output of `layers[layer]` (repeng/control.py, `ControlModel`). llama.cpp's
  own generator writes what it found behind block L as `direction.{L + 1}` (tools/cvector-generator/mean.hpp); what
  counts here is where a file's vectors are added.
* **steering-vectors**: `layer_activations[N]` with `layer_type` "decoder_block" is added to the output of block N,
  counted from 0 (steering_vectors/steering_vector.py, `patch_activations`; layer_matching.py,
  `collect_matching_layers`). Other layer types are other places and refused. It has no call that saves: files hold a
  dict of the two, or the `SteeringVector` itself, of which the two are read and its class is not needed.
* **persona**, of persona_vectors: row R is `hidden_states[R]` (generate_vec.py, `get_hidden_p_and_r`), so row 0 is the
  embeddings and row R belongs behind block R - 1, where it is added (eval/eval_persona.py, `layer_idx=layer-1`).
  The last row was read behind the final norm, as that is what transformers returns there.
* **torch** and **safetensors**, `{layer: tensor}` and nothing else, are taken to mean what we mean, as steerllm did.
* **checkpoint**: our own folder, or that of steerllm; see `formats.checkpoint`.
"""

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from steer_service.core.arrays import Float32Array
from steer_service.core.errors import InvalidRequest, within
from steer_service.core.specs import AddSpec, SteeringSpec
from steer_service.formats.atomic_write import atomic_write
from steer_service.formats.checkpoint import read_checkpoint, spec_of_additions
from steer_service.formats.safetensors_file import PT_METADATA, write_tensors
from steer_service.formats.torch_file import finite_vector, read_torch, vectors_by_layer

ARCHITECTURE = "controlvector"
"""What control vectors in GGUF call themselves."""

BLOCK = "decoder_block"
"""The layer type of steering-vectors that is the residual stream after a block."""

BEHIND_BLOCK = "N is the residual stream after decoder block N, counted from 0"

CONVENTIONS = {
    "gguf": f"direction.{BEHIND_BLOCK}, as in repeng and llama.cpp",
    "steering-vectors": f"layer_activations[N] with layer type {BLOCK}: {BEHIND_BLOCK}",
    "persona": "row R is hidden_states[R], the stream after block R - 1; row 0, the embeddings, is left out",
    "torch": f"the file does not say; taken to mean that layer {BEHIND_BLOCK}",
    "safetensors": f"the file does not say; taken to mean that layer {BEHIND_BLOCK}",
    "checkpoint": f"layer {BEHIND_BLOCK}",
}
"""Kind of file -> what its layers mean."""

EXPECTED = (
    "expected a control vector (.gguf), {layer: tensor} (.pt or .safetensors), a file of steering-vectors or persona "
    "vectors (.pt), or a folder with steering.json"
)

Vectors = Mapping[int, Float32Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """Vectors that were read from a file."""

    layers: Vectors
    """Layer, in our convention -> its vector, float32, shape [hidden_size], of the length it has in the file."""
    kind: str
    """Which of `CONVENTIONS` the file was."""
    model_hint: str = ""
    """What the file says about the model, such as `llama`; "" if nothing."""

    @property
    def convention(self) -> str:
        """One sentence: which convention for layers was assumed."""
        return CONVENTIONS[self.kind]

    def to_spec(self, scale: float = 1.0) -> SteeringSpec:
        """A spec that adds `scale` times each vector behind its layer; vectors of zeros are left out."""
        return spec_of_additions(self.layers, scale)


def read_vectors(path: str | Path, *, kind: str | None = None) -> Imported:
    """The vectors in a file or folder; its kind, unless given, is found out from its name and content.

    Raises InvalidRequest for what is not understood, or would run code.
    """
    place = Path(path)
    if not place.exists():
        raise InvalidRequest(f"there is no {place.name}; {EXPECTED}", reason="NO_FILE", field="path")
    found = kind or _kind_by_name(place)
    if found is None:
        return _read_torch(place)
    _check_kind(found, READERS)
    return READERS[found](place)


def write_vectors(path: str | Path, layers: Mapping[int, Any], *, kind: str, model_hint: str = "") -> None:
    """Writes the vectors of `layers`, in our convention, to a file of this kind, as a whole.

    `model_hint`, the model's type such as `llama`, is written where there is a place for it. Raises InvalidRequest for
    vectors that are no vectors, and for layer 0 in a GGUF.
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
        raise _unknown_layout(f"{path.name} has none of the known endings")
    return suffix.removeprefix(".")


def _check_kind(kind: str, known: Mapping[str, Any]) -> None:
    if kind not in known:
        raise InvalidRequest(f"kind {kind!r} is not one of {', '.join(known)}", reason="UNKNOWN_KIND", field="kind")


def _unknown_layout(found: str, expected: str = EXPECTED) -> InvalidRequest:
    return InvalidRequest(f"{found}; {expected}", reason="UNKNOWN_LAYOUT", field="path")


# -- torch -------------------------------------------------------------------------------------------------------------


class SteeringVector:
    """Stands for the class of that name in files of steering-vectors, and runs nothing of it.

    Relies on (steering-vectors 0.12): an ordinary dataclass, whose pickle holds its fields; (torch 2.5) `safe_globals`
    finds a class by the module and name that it says it has. `test_peers.py` notices.
    """

    __module__ = "steering_vectors.steering_vector"
    fields: Mapping[str, Any] = MappingProxyType({})

    def __setstate__(self, fields: Any) -> None:
        if not isinstance(fields, Mapping):
            raise ValueError("the fields are no dict")
        self.fields = fields


_ONE_AT_A_TIME = threading.Lock()
"""What torch takes for safe is kept once per process."""


def _content(path: Path) -> Any:
    """What `read_torch` reads; of a `SteeringVector`, its fields."""
    with _ONE_AT_A_TIME, torch.serialization.safe_globals([SteeringVector]):
        content = read_torch(path)
    return content.fields if isinstance(content, SteeringVector) else content


def _read_torch(path: Path) -> Imported:
    content = _content(path)
    if isinstance(content, torch.Tensor):
        return _persona_from(content)
    if isinstance(content, Mapping) and "layer_activations" in content:
        return _steering_vectors_from(content)
    if isinstance(content, Mapping):
        return _plain_from(content)
    raise _unknown_layout(f"the file holds a {type(content).__name__}")


def _plain_from(content: Any) -> Imported:
    return Imported(layers=vectors_by_layer(content), kind="torch")


def _write_plain(path: Path, vectors: Vectors, model_hint: str) -> None:
    torch.save(_as_tensors(vectors), path)


def _steering_vectors_from(content: Any) -> Imported:
    if not isinstance(content, Mapping) or "layer_activations" not in content:
        raise _unknown_layout("the file has no layer_activations", "expected {layer_activations, layer_type}")
    layer_type = content.get("layer_type", BLOCK)
    if layer_type != BLOCK:
        raise _unknown_layout(f"layer type {layer_type!r:.40} is not the residual stream", f"expected {BLOCK!r}")
    return Imported(layers=vectors_by_layer(content["layer_activations"]), kind="steering-vectors")


def _write_steering_vectors(path: Path, vectors: Vectors, model_hint: str) -> None:
    torch.save({"layer_activations": _as_tensors(vectors), "layer_type": BLOCK}, path)


def _persona_from(content: Any) -> Imported:
    if not isinstance(content, torch.Tensor) or content.ndim != 2 or len(content) < 2:
        shape = list(content.shape) if isinstance(content, torch.Tensor) else type(content).__name__
        raise _unknown_layout(f"the file holds {shape}", "expected a tensor of shape [layers + 1, hidden_size]")
    layers = {}
    for row in range(1, len(content)):
        with within(f"rows[{row}]"):
            layers[row - 1] = finite_vector(content[row])
    return Imported(layers={layer: vector for layer, vector in layers.items() if vector.any()}, kind="persona")


def _write_persona(path: Path, vectors: Vectors, model_hint: str) -> None:
    """Rows up to the highest layer's; those of the embeddings and of layers without a vector are zeros."""
    width = next(iter(vectors.values())).size
    rows = torch.zeros(max(vectors) + 2, width)
    for layer, vector in _as_tensors(vectors).items():
        rows[layer + 1] = vector
    torch.save(rows, path)


def _as_tensors(vectors: Vectors) -> dict[int, torch.Tensor]:
    return {layer: torch.from_numpy(vector.copy()) for layer, vector in vectors.items()}


# -- safetensors -------------------------------------------------------------------------------------------------------


def _read_safetensors(path: Path) -> Imported:
    try:
        content = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InvalidRequest(f"{path.name} is not a safetensors file", reason="BAD_TENSORS", field="path") from error
    return Imported(layers=vectors_by_layer(content), kind="safetensors")


def _write_safetensors(path: Path, vectors: Vectors, model_hint: str) -> None:
    write_tensors(path, {str(layer): vector for layer, vector in vectors.items()}, PT_METADATA)


# -- GGUF --------------------------------------------------------------------------------------------------------------


class _BoundedReader(gguf.GGUFReader):
    """A reader that stops at the file's end.

    Relies on (read in gguf 0.19): everything is read through `_get`, which returns less beyond the end; an array that
    claims to be endless would fill the memory. `test_a_gguf_that_claims_more_than_it_holds_is_refused` notices.
    """

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        if offset + np.dtype(dtype).itemsize * int(count) > self.data.nbytes:
            raise ValueError("the file ends within what it says it holds")
        return super()._get(offset, dtype, count, override_order)


def _read_gguf(path: Path) -> Imported:
    try:
        reader = _BoundedReader(path)
        architecture = _text(reader, "general.architecture")
        model_hint = _text(reader, f"{ARCHITECTURE}.model_hint")
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise InvalidRequest(f"{path.name} is not a GGUF file", reason="BAD_GGUF", field="path") from error
    if architecture != ARCHITECTURE:
        raise _unknown_layout(f"architecture {architecture!r:.40} is no control vector", f"expected {ARCHITECTURE!r}")
    layers = {_direction_of(tensor.name): _direction(tensor) for tensor in reader.tensors}
    return Imported(layers=vectors_by_layer(layers), kind="gguf", model_hint=model_hint)


def _text(reader: gguf.GGUFReader, key: str) -> str:
    field = reader.get_field(key)
    return "" if field is None else str(field.contents())


def _direction_of(name: str) -> int:
    found = re.fullmatch(r"direction\.(0|[1-9][0-9]{0,8})", name)
    if found is None:
        raise _unknown_layout(f"tensor {name!r:.60} is no direction", "expected direction.N")
    return int(found[1])


def _direction(tensor: gguf.ReaderTensor) -> Any:
    if tensor.tensor_type not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        raise _unknown_layout(f"{tensor.name} has type {tensor.tensor_type.name}", "expected F32 or F16")
    return tensor.data


def _write_gguf(path: Path, vectors: Vectors, model_hint: str) -> None:
    if 0 in vectors:
        raise InvalidRequest(
            "a control vector has no direction for layer 0: llama.cpp refuses direction.0",
            reason="UNKNOWN_LAYER",
            field="layers[0]",
        )
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    try:
        writer.add_string(f"{ARCHITECTURE}.model_hint", model_hint)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(vectors))
        for layer, vector in vectors.items():
            writer.add_tensor(f"direction.{layer}", vector)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


# -- our own folder ----------------------------------------------------------------------------------------------------


def _read_checkpoint(path: Path) -> Imported:
    checkpoint = read_checkpoint(path)
    vectors = {}
    for layer, spec in checkpoint.spec.layers.items():
        if not all(isinstance(operation, AddSpec) for operation in spec.operations):
            raise InvalidRequest(
                "expected additions alone; load_spec reads the others", reason="NOT_A_VECTOR", field=f"layers[{layer}]"
            )
        added = [operation.materialize() for operation in spec.operations if isinstance(operation, AddSpec)]
        vectors[layer] = np.sum(added, axis=0, dtype=np.float32)
    return Imported(layers=vectors_by_layer(vectors), kind="checkpoint", model_hint=checkpoint.model.name)


READERS: dict[str, Callable[[Path], Imported]] = {
    "gguf": _read_gguf,
    "steering-vectors": lambda path: _steering_vectors_from(_content(path)),
    "persona": lambda path: _persona_from(read_torch(path)),
    "torch": lambda path: _plain_from(read_torch(path)),
    "safetensors": _read_safetensors,
    "checkpoint": _read_checkpoint,
}
"""Kind -> what reads it."""

WRITERS: dict[str, Callable[[Path, Vectors, str], None]] = {
    "gguf": _write_gguf,
    "steering-vectors": _write_steering_vectors,
    "persona": _write_persona,
    "torch": _write_plain,
    "safetensors": _write_safetensors,
}
"""Kind -> what writes (path, vectors, model hint). A checkpoint, which belongs to a model, is `save_spec`'s."""
