"""Trained steering, which is a folder: vectors in `steering.safetensors`, everything else in `steering.json`.

    {"format": "steerllm steering", "version": 1,
     "site": "residual_after_layer",
     "layer_convention": "layer L is the residual stream after decoder block L, counted from 0",
     "model": {"name": "...", "revision": null, "hidden_size": 576, "layer_count": 30},
     "steering": <the spec, as spec_to_json writes it, its vectors in the other file>,
     "digest": <of the spec>, "tensors_sha256": <of the other file>,
     "trained": {"5": "add"},
     "about": {...}}

`trained` names the kinds of trainable steering. Their parameters are tensors `trained.<layer>.<parameter>`. A folder
with a saved spec has none. Each file is replaced as a whole. Two files that do not belong together are refused.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from steer_service.core.arrays import Float32Array
from steer_service.core.backend import ModelInfo
from steer_service.core.checks import check_steering
from steer_service.core.errors import InvalidRequest, within
from steer_service.core.field_checks import check_layer
from steer_service.core.specs import SteeringSpec
from steer_service.formats.atomic_write import atomic_write
from steer_service.formats.layer_vectors import spec_of_additions
from steer_service.formats.legacy import VECTORS, read_legacy
from steer_service.formats.safetensors_file import PT_METADATA, LazyTensors, write_tensors
from steer_service.formats.spec_json import spec_from_json, spec_to_json
from steer_service.formats.unique_json import parse_json

DOCUMENT = "steering.json"
TENSORS = "steering.safetensors"

DIRECTIONS = "directions.safetensors"
"""A file of vectors that `steer train` writes beside them: the directions of all layers, `{layer: vector}`."""

FORMAT = "steerllm steering"
VERSION = 1
SITE = "residual_after_layer"
LAYER_CONVENTION = "layer L is the residual stream after decoder block L, counted from 0"

HEAD = {"format": FORMAT, "version": VERSION, "site": SITE, "layer_convention": LAYER_CONVENTION}
"""Fields that every document has, with the values that this version reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedModel:
    """The model that steering was made for."""

    name: str = ""
    """The name; "" if it is not known."""
    revision: str | None = None
    """The revision, such as a commit; None if it is not known."""
    hidden_size: int
    """Hidden size of the model."""
    layer_count: int | None = None
    """Number of decoder blocks; None if it is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """The trainable steering of one layer, as it was saved."""

    kind: str
    """What it does: `add`, `projection_cap` or `ablation`."""
    parameters: Mapping[str, npt.NDArray[np.float32]]
    """Name -> value: the vector, shape [hidden_size], and numbers, shape []."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The content of a folder of trained steering."""

    spec: SteeringSpec
    """The steering."""
    model: SavedModel
    """The model that it was made for."""
    trained: Mapping[int, Trained] | None = None
    """Layer -> its trainable steering; None if the folder has only a spec."""
    about: Mapping[str, object] = field(default_factory=dict)
    """Notes of the caller that saved it."""


def save_spec(
    directory: str | Path,
    spec: SteeringSpec,
    *,
    model: ModelInfo,
    revision: str | None = None,
    about: Mapping[str, object] | None = None,
) -> None:
    """Saves `spec`, made for `model`, to the folder, which is created if needed. `about` is saved unchanged.

    Raises InvalidRequest for a spec that does not fit the model, or an `about` that is not JSON.
    """
    with within("spec"):
        check_steering(spec, model)
    saved = SavedModel(name=model.name, revision=revision, hidden_size=model.hidden_size, layer_count=model.layer_count)
    write_checkpoint(directory, Checkpoint(spec=spec, model=saved, about=about or {}))


def load_spec(
    directory: str | Path, *, model: ModelInfo | None = None, revision: str | None = None, any_model: bool = False
) -> SteeringSpec:
    """The steering in a folder that `steer train` or `save_steering` wrote, for `steering_spec`.

    Reads folders of the in-process steerllm too. Raises InvalidRequest for files that are missing or damaged and, with
    `model`, such as `client.info`, for steering of another model or `revision`, unless `any_model`.
    """
    return read_checkpoint(directory, model=model, revision=revision, any_model=any_model).spec


def write_checkpoint(directory: str | Path, checkpoint: Checkpoint) -> None:
    """Writes both files of the folder, each as a whole."""
    tensors: dict[str, npt.NDArray[np.float32]] = {
        _name_of(layer, name): value
        for layer, trained in (checkpoint.trained or {}).items()
        for name, value in trained.parameters.items()
    }

    def put(name: str, vector: Float32Array) -> dict[str, str]:
        tensors[name] = vector
        return {"file": TENSORS, "tensor": name}

    document = _document_of(checkpoint, spec_to_json(checkpoint.spec, put))
    _json_bytes(document)  # an error here must come before anything is written
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / TENSORS) as path:
        write_tensors(path, tensors, PT_METADATA)
        document["tensors_sha256"] = sha256_of_file(path)
    with atomic_write(folder / DOCUMENT) as path:
        path.write_bytes(_json_bytes(document))


def read_checkpoint(
    directory: str | Path, *, model: ModelInfo | None = None, revision: str | None = None, any_model: bool = False
) -> Checkpoint:
    """The content of the folder. Folders of the in-process steerllm are read too.

    Raises InvalidRequest for files that are missing, damaged, of another version or do not belong together. With
    `model`, it is also raised for steering made for another hidden size, layer count, name or
    `revision`, if both are known. `any_model` accepts another name and another revision.
    """
    folder = Path(directory)
    check_no_part(folder)
    checkpoint = _read_ours(folder) if (folder / DOCUMENT).exists() else _read_legacy(folder)
    _check_layers(checkpoint)
    if model is not None:
        _check_model(checkpoint, model, revision, any_model=any_model)
    return checkpoint


def check_no_part(path: Path) -> None:
    """Raises InvalidRequest if `path` is one of the two files of trained steering: they are read as their folder."""
    if path.name not in (DOCUMENT, TENSORS):
        return
    folder = path.parent
    try:
        document = parse_json((folder / DOCUMENT).read_bytes(), field=DOCUMENT)
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(document, dict) and document.get("format") == FORMAT:
        other = (
            f", or {folder / DIRECTIONS} for the directions of all layers" if (folder / DIRECTIONS).is_file() else ""
        )
        raise InvalidRequest(
            f"this file is a part of trained steering, which is a folder; give the folder {folder}{other}",
            reason="NOT_A_VECTOR",
            field="path",
        )


def sha256_of_file(path: Path) -> str:
    """SHA-256 of the file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _document_of(checkpoint: Checkpoint, steering: dict[str, Any]) -> dict[str, Any]:
    model, trained = checkpoint.model, checkpoint.trained
    document = HEAD | {
        "model": {
            "name": model.name,
            "revision": model.revision,
            "hidden_size": model.hidden_size,
            "layer_count": model.layer_count,
        },
        "steering": steering,
        "digest": checkpoint.spec.digest(),
        "about": dict(checkpoint.about),
    }
    if trained is None:
        return document
    return document | {"trained": {str(layer): trained[layer].kind for layer in trained}}


def _json_bytes(document: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(document, indent=2, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"it cannot be written as JSON: {error}", reason="BAD_JSON", field="about") from error


def _read_ours(folder: Path) -> Checkpoint:
    document = _document(folder / DOCUMENT)
    for name, known in HEAD.items():
        if document.get(name) != known:
            raise InvalidRequest(
                f"{document.get(name)!r:.80} is not supported; expected {known!r}", reason="UNKNOWN_FORMAT", field=name
            )
    tensors = _tensors(folder / TENSORS, document)
    spec = spec_from_json(document.get("steering"), folder)
    if document.get("digest") != spec.digest():
        raise InvalidRequest("the steering is not what was saved", reason="WRONG_DIGEST", field="digest")
    about = document.get("about", {})
    return Checkpoint(
        spec=spec,
        model=_model_from(document),
        trained=_trained_from(document["trained"], tensors) if "trained" in document else None,
        about=_checked("about", about, dict),
    )


def _document(path: Path) -> dict[str, Any]:
    try:
        document = parse_json(path.read_bytes(), field=DOCUMENT)
    except InvalidRequest:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{DOCUMENT} is not readable JSON", reason="BAD_JSON", field=DOCUMENT) from error
    return _checked(DOCUMENT, document, dict)


def _tensors(path: Path, document: Mapping[str, Any]) -> LazyTensors:
    try:
        if sha256_of_file(path) != document.get("tensors_sha256"):
            raise InvalidRequest(
                f"{TENSORS} is not the file that was saved with {DOCUMENT}",
                reason="WRONG_DIGEST",
                field="tensors_sha256",
            )
        return LazyTensors(path)
    except OSError as error:
        raise InvalidRequest(f"{TENSORS} cannot be read", reason="BAD_TENSORS", field=TENSORS) from error
    except ValueError as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest(f"{TENSORS} is not a safetensors file", reason="BAD_TENSORS", field=TENSORS) from error


def _model_from(document: Mapping[str, Any]) -> SavedModel:
    with within("model"):
        found = _checked("", document.get("model"), dict)
        return SavedModel(
            name=_checked("name", found.get("name"), str),
            revision=None if found.get("revision") is None else _checked("revision", found["revision"], str),
            hidden_size=_checked("hidden_size", found.get("hidden_size"), int),
            layer_count=None
            if found.get("layer_count") is None
            else _checked("layer_count", found["layer_count"], int),
        )


def _trained_from(kinds: Any, tensors: Mapping[str, npt.NDArray[Any]]) -> dict[int, Trained]:
    trained = {}
    for key, kind in _checked("trained", kinds, dict).items():
        with within(f"trained[{key}]"):
            prefix = _name_of(key, "")
            parameters = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
            _check_parameters(key, parameters)
            trained[int(key)] = Trained(kind=_checked("", kind, str), parameters=parameters)
    return trained


def _check_parameters(key: str, parameters: Mapping[str, npt.NDArray[Any]]) -> None:
    if not re.fullmatch("[0-9]{1,9}", key) or "vector" not in parameters:
        raise InvalidRequest("expected a layer with a vector", reason="BAD_CHECKPOINT")
    for name, value in parameters.items():
        if value.dtype != np.float32 or value.ndim != (name == "vector"):
            raise InvalidRequest("expected float32, a vector or a number", reason="BAD_CHECKPOINT", field=name)
        if not np.isfinite(value).all():
            raise InvalidRequest("it contains NaN or Inf values", reason="NON_FINITE", field=name)


def _name_of(layer: int | str, parameter: str) -> str:
    return f"trained.{layer}.{parameter}"


def _checked(name: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InvalidRequest(f"expected {kind.__name__}, got {type(value).__name__}", reason="BAD_JSON", field=name)
    return value


def _read_legacy(folder: Path) -> Checkpoint:
    if not (folder / VECTORS).exists():
        raise InvalidRequest(
            f"this is no trained steering: the folder has neither {DOCUMENT} nor {VECTORS}",
            reason="NOT_A_CHECKPOINT",
            field="directory",
        )
    legacy = read_legacy(folder)
    return Checkpoint(
        spec=spec_of_additions(legacy.vectors),
        model=SavedModel(name=legacy.model_name, hidden_size=legacy.hidden_size),
        trained={layer: Trained(kind="add", parameters={"vector": vector}) for layer, vector in legacy.vectors.items()},
    )


def _check_layers(checkpoint: Checkpoint) -> None:
    sizes = {
        layer: [operation.vector.size for operation in spec.operations]
        for layer, spec in checkpoint.spec.layers.items()
    }
    for layer, trained in (checkpoint.trained or {}).items():
        sizes.setdefault(layer, []).append(trained.parameters["vector"].size)
    for layer, found in sizes.items():
        with within(f"layers[{layer}]"):
            _check_layer(layer, found, checkpoint.model)


def _check_layer(layer: int, sizes: list[int], model: SavedModel) -> None:
    if model.layer_count is not None:
        check_layer(layer, model.layer_count - 1)
    for size in sizes:
        if size != model.hidden_size:
            raise InvalidRequest(f"expected {model.hidden_size} numbers, got {size}", reason="WRONG_WIDTH")


def _check_model(checkpoint: Checkpoint, model: ModelInfo, revision: str | None, *, any_model: bool) -> None:
    saved = checkpoint.model
    if saved.hidden_size != model.hidden_size:
        raise _other_model("hidden_size", saved.hidden_size, model.hidden_size, "WRONG_WIDTH")
    if saved.layer_count not in (None, model.layer_count):
        raise _other_model("layer_count", saved.layer_count, model.layer_count, "WRONG_LAYER_COUNT")
    if not any_model and saved.name not in ("", model.name):
        raise _other_model("name", saved.name, model.name, "WRONG_MODEL")
    if not any_model and None not in (saved.revision, revision) and saved.revision != revision:
        raise _other_model("revision", saved.revision, revision, "WRONG_REVISION")
    with within("steering"):
        check_steering(checkpoint.spec, model)


def _other_model(name: str, saved: Any, here: Any, reason: str) -> InvalidRequest:
    hint = f"; any_model=True lets another {name} pass" if name in ("name", "revision") else ""
    return InvalidRequest(
        f"it was made for {saved!r}, the model here has {here!r}{hint}", reason=reason, field=f"model.{name}"
    )
