"""Dictionaries: vectors under the names of layers, and one known entry with a vector or rows.

* **steering-vectors**: `layer_activations` with `layer_type`; see `formats.vector_files`.
* **vllm-lens**: `activations`, shape [layers, hidden_size], with `layer_indices`, `scale` and `norm_match`, added to
  the output of each of these layers (vllm_lens/_helpers/types.py, `SteeringVector`).
* **named vector**: `vector`, `direction` or another of `ENTRIES`, optionally with its `layer`.
* **by layer**: keys that `layer_of_key` understands. The readers of RepE (repe 0.1.4, rep_readers.py) have `directions`
  by -1, -2, ..., each of shape [components, hidden_size].
"""

from collections.abc import Mapping
from typing import Any

from steer_service.core.errors import InvalidRequest, within
from steer_service.core.field_checks import is_integer
from steer_service.core.number_limits import MAX_LAYERS
from steer_service.core.specs import AddSpec
from steer_service.formats.layer_vectors import BLOCK, Imported
from steer_service.formats.layouts.array_layouts import array_layout, one_vector
from steer_service.formats.layouts.layer_names import layer_of_key
from steer_service.formats.layouts.open_file import OpenFile, bad
from steer_service.formats.layouts.stored_array import StoredArray, stacked

ENTRIES = (
    "vector", "direction", "steering_vector", "steering_vectors", "axis", "assistant_axis", "refusal_direction",
    "persona_vector", "control_vector", "mean_diff", "mean_diffs", "arr_0", "data", "tensor", "array",
)  # fmt: skip
"""Names of the one entry that holds the vector or the rows."""

ABOUT = ("model", "model_name", "model_id", "model_type", "name", "description", "date", "timestamp", "metadata")
"""Entries that say something about the file and change no vector."""


def layer_activations_layout(file: OpenFile) -> Imported | None:
    """A file of steering-vectors; None for another."""
    content = file.content
    if not isinstance(content, Mapping) or "layer_activations" not in content:
        return None
    file.options.check_used("layer")
    layer_type = content.get("layer_type", BLOCK)
    if layer_type != BLOCK:
        raise bad(f"layer type {layer_type!r:.40} is not the residual stream; expected {BLOCK!r}")
    if not isinstance(content["layer_activations"], Mapping):
        raise bad("layer_activations is not a dict; expected {layer: tensor}")
    return _by_layer(file, content["layer_activations"], "steering-vectors")


def layer_indices_layout(file: OpenFile) -> Imported | None:
    """A steering vector of vllm-lens; None for another file."""
    content = file.content
    if not isinstance(content, Mapping) or not {"activations", "layer_indices"} <= content.keys():
        return None
    file.options.check_used()
    array, layers = content["activations"], _whole_numbers(content["layer_indices"])
    scale, keep_norm = content.get("scale", 1.0), content.get("norm_match", False)
    if not isinstance(array, StoredArray) or len(array.shape) != 2 or array.shape[0] != len(layers):
        raise bad("activations is not an array of shape [layer_indices, hidden_size]")
    if content.get("position_indices") is not None:
        raise bad("position_indices: vectors for single positions are not read")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not isinstance(keep_norm, bool):
        raise bad("scale is not a number, or norm_match is not True or False")
    operations: dict[int, tuple[AddSpec, ...]] = {}
    for row, layer in enumerate(layers):
        with within(f"rows[{row}]"):
            added = AddSpec(vector=array.vector(row), scale=scale, keep_norm=keep_norm)
            operations[layer] = (*operations.get(layer, ()), added)
    return file.operations(operations, "vllm-lens")


def entry_layout(file: OpenFile) -> Imported | None:
    """A dict with one known entry, its layer and what is about the file; None for another."""
    content = file.content
    if not isinstance(content, Mapping):
        return None
    arrays = {key: _as_array(value) for key, value in content.items() if key in ENTRIES}
    others = content.keys() - arrays.keys() - {"layer", "layer_idx", *ABOUT}
    if len(arrays) != 1 or others:
        return None
    [(key, array)] = arrays.items()
    if array is None:
        raise bad(f"{key} is not an array")
    layer, hint = content.get("layer", content.get("layer_idx")), _model_of(content)
    if layer is None:
        return array_layout(_with(file, array), array, hint=hint)
    if not is_integer(layer) or not 0 <= layer < MAX_LAYERS or not array.is_one_vector:
        raise bad(f"layer {layer!r:.40} and {key} {array} are not one vector with its layer")
    return one_vector(file, array, layer=int(layer), hint=hint)


def by_layer_layout(file: OpenFile) -> Imported | None:
    """A dict of vectors under the names of their layers, in the container's kind; None for another."""
    content = file.content
    if not isinstance(content, Mapping) or not content:
        return None
    names = [key for key in content if key not in ABOUT]
    layers = [layer_of_key(name, file.options.layer_count) for name in names]
    if None in layers or not layers:
        return None
    file.options.check_used("layer")
    return _by_layer(file, {name: content[name] for name in names}, file.container, _model_of(content))


def _by_layer(file: OpenFile, found: Mapping[Any, Any], kind: str, hint: str = "") -> Imported:
    if not found:
        raise bad("there is no layer; expected {layer: tensor}")
    vectors = {}
    for key, value in found.items():
        layer = layer_of_key(key, file.options.layer_count)
        array = _as_array(value.get("vector") if isinstance(value, Mapping) else value)
        if layer is None:
            raise bad(f"{key!r:.40} is not a layer: expected a whole number in 0..{MAX_LAYERS - 1}")
        if layer in vectors:
            raise bad(f"layer {layer} is there twice")
        if array is None or (isinstance(value, Mapping) and len(value) > 1):
            raise bad(f"layer {layer} is not a vector")
        if file.options.layer in (None, layer):
            with within(f"layers[{layer}]"):
                vectors[layer] = array.only_vector() if array.is_one_vector else array.vector()
        else:
            vectors[layer] = None  # type: ignore[assignment]  # it counts as seen and is not read
    return file.vectors(file.chosen(vectors), kind, hint_of(hint), hint)


def hint_of(model: str) -> str:
    """What is said of a model that the file names."""
    return f"for {model}" if model else ""


def _as_array(value: Any) -> StoredArray | None:
    """An array, or a list of vectors of one size as an array of rows; None for anything else."""
    if isinstance(value, StoredArray):
        return value
    if not isinstance(value, list) or not value or not all(isinstance(item, StoredArray) for item in value):
        return None
    shapes = {item.shape for item in value}
    return stacked(value) if len(shapes) == 1 and len(value[0].shape) == 1 else None


def list_layout(file: OpenFile) -> Imported | None:
    """An array, or a list of vectors of one size, which is read as rows; None for another file."""
    array = _as_array(file.content)
    return None if array is None else array_layout(_with(file, array), array)


def _with(file: OpenFile, array: StoredArray) -> OpenFile:
    """The file as if it held this array alone."""
    return OpenFile(path=file.path, container=file.container, content=array, options=file.options, config=file.config)


def _model_of(content: Mapping[Any, Any]) -> str:
    found = next((content[key] for key in ("model", "model_name", "model_id", "model_type") if key in content), "")
    return found if isinstance(found, str) else ""


def _whole_numbers(value: Any) -> list[int]:
    if isinstance(value, StoredArray) and len(value.shape) == 1 and 0 < value.shape[0] <= MAX_LAYERS:
        numbers = [float(number) for number in value.vector()]
        if all(number.is_integer() and 0 <= number < MAX_LAYERS for number in numbers):
            return [int(number) for number in numbers]
    raise InvalidRequest(
        f"layer_indices is not a list of whole numbers in 0..{MAX_LAYERS - 1}", reason="UNKNOWN_LAYOUT", field="path"
    )
