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
* **torch**, **safetensors**, **numpy** and **json**: `{layer: vector}`, where a layer is a number or a name such as
  `model.layers.13`, is read with our convention, as the in-process steerllm did.
* **trained-steering**: our own folder, or that of the in-process steerllm. `kind="checkpoint"` means it too.

docs/vector_files.md has the other kinds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from steer_service.core.errors import InvalidRequest
from steer_service.core.specs import AddSpec, SteeringOp
from steer_service.formats.atomic_write import atomic_write
from steer_service.formats.checkpoint import check_no_part, read_checkpoint
from steer_service.formats.gguf_vectors import read_gguf, write_gguf
from steer_service.formats.layer_vectors import ALIASES, CONVENTIONS, TRAINED, Imported, Vectors, vectors_by_layer
from steer_service.formats.layouts.file_content import READERS, check_readable, container_of, read_file
from steer_service.formats.layouts.open_file import OpenFile, naming
from steer_service.formats.layouts.read_options import ReadOptions, RowOrder
from steer_service.formats.layouts.recognise import recognise
from steer_service.formats.layouts.sae_decoder import config_beside, weights_in
from steer_service.formats.safetensors_file import PT_METADATA, write_tensors
from steer_service.formats.torch_vectors import write_persona, write_plain, write_steering_vectors


def read_vectors(
    path: str | Path,
    *,
    kind: str | None = None,
    layer: int | None = None,
    rows: Literal["after-layer", "embeddings-first"] | RowOrder | None = None,
    position: int | None = None,
    feature: int | None = None,
    experiment: str | None = None,
    layer_count: int | None = None,
    hidden_size: int | None = None,
) -> Imported:
    """The steering in a file or folder of any known layout; its content says which, and `kind` demands one.

    `layer` is the layer of a file with one vector, or the only one to read; `rows` the order of rows by layer;
    `position` the index in an array by position; `feature` that of a sparse autoencoder; `experiment` the id in a
    capping configuration. `layer_count` and `hidden_size` of the model are compared with the file. What a file does
    not say is never guessed: docs/vector_files.md has the layouts and the options that decide.

    Raises InvalidRequest for a file that cannot be read, needs an option or does not fit the model, and Unsupported
    if a package for this kind of file is not installed. Code in a file is never run.
    """
    order: Any = rows
    place = Path(path)
    with naming(place):
        options = ReadOptions(
            layer=layer,
            rows=order,
            position=position,
            feature=feature,
            experiment=experiment,
            layer_count=layer_count,
            hidden_size=hidden_size,
        )
        kind = None if kind is None else ALIASES.get(kind, kind)
        if kind is not None:
            _check_kind(kind, CONVENTIONS)
        check_no_part(place)
        check_readable(place)
        weights = weights_in(place) if place.is_dir() else place
        found = _read_checkpoint(place, options) if weights is None else _read_any(weights, kind, options)
        if kind not in (None, found.kind):
            raise InvalidRequest(f"it is read as {found.kind}, not {kind}", reason="UNKNOWN_LAYOUT", field="path")
        return found


def _read_any(path: Path, kind: str | None, options: ReadOptions) -> Imported:
    container = kind if kind is not None and (kind == "gguf" or kind in READERS) else container_of(path)
    if container == "gguf":
        return _read_gguf(path, options)
    if kind == "persona" and options.rows is None:
        options = replace(options, rows=RowOrder.EMBEDDINGS_FIRST)
    file = OpenFile(
        path=path,
        container=container,
        content=read_file(path, container),
        options=options,
        config=config_beside(path),
    )
    with naming(path, file.content):
        if kind in (*READERS, "steering-vectors") and not isinstance(file.content, Mapping):
            raise file.unknown("expected a dict of vectors by layer")
        if kind == "persona" and isinstance(file.content, Mapping):
            raise file.unknown("expected rows of shape [layers + 1, hidden_size]")
        return recognise(file)


def _read_gguf(path: Path, options: ReadOptions) -> Imported:
    options.check_used("layer")
    found = read_gguf(path)
    return _fitted(path, "gguf", options, found.layers, found.model_hint)


def _read_checkpoint(path: Path, options: ReadOptions) -> Imported:
    options.check_used("layer")
    checkpoint = read_checkpoint(path)
    layers = checkpoint.spec.layers.items()
    if checkpoint.spec.positions is None and all(_is_plain(spec.operations) for _, spec in layers):
        vectors = {
            layer: np.sum([one.materialize() for one in spec.operations], axis=0, dtype=np.float32)  # type: ignore[union-attr]
            for layer, spec in layers
        }
        return _fitted(path, TRAINED, options, vectors_by_layer(vectors), checkpoint.model.name)
    raise InvalidRequest(
        "expected plain additions only; load_spec reads other operations",
        reason="NOT_A_VECTOR",
        field="layers",
    )


def _fitted(path: Path, kind: str, options: ReadOptions, vectors: Vectors, hint: str) -> Imported:
    file = OpenFile(path=path, container=kind, content=None, options=options)
    return file.vectors(file.chosen(vectors), kind, model_hint=hint)


def _is_plain(operations: Sequence[SteeringOp]) -> bool:
    """True if the vectors and scales of these operations say all about them."""
    return all(isinstance(one, AddSpec) and one == AddSpec(one.vector, one.scale) for one in operations)


def write_vectors(path: str | Path, layers: Mapping[int, Any], *, kind: str, model_hint: str = "") -> None:
    """Writes the vectors of `layers`, in our convention, to a file of this kind; the file appears complete.

    `model_hint`, the model's type such as `llama`, is written if the kind has a field for it. Raises InvalidRequest for
    invalid vectors, and for layer 0 in a GGUF.
    """
    _check_kind(kind, WRITERS)
    vectors = vectors_by_layer(layers)
    with atomic_write(Path(path)) as part:
        WRITERS[kind](part, vectors, model_hint)


def _check_kind(kind: str, known: Mapping[str, Any]) -> None:
    if kind not in known:
        raise InvalidRequest(f"kind {kind!r} is not one of {', '.join(known)}", reason="UNKNOWN_KIND", field="kind")


def _write_safetensors(path: Path, vectors: Vectors, model_hint: str) -> None:
    write_tensors(path, {str(layer): vector for layer, vector in vectors.items()}, PT_METADATA)


WRITERS: dict[str, Callable[[Path, Vectors, str], None]] = {
    "gguf": write_gguf,
    "steering-vectors": write_steering_vectors,
    "persona": write_persona,
    "torch": write_plain,
    "safetensors": _write_safetensors,
}
"""Kind -> the function that writes (path, vectors, model hint).

`save_spec` writes trained steering: it needs a model.
"""
