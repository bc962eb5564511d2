"""A SteeringSpec as a JSON document, for files and command lines.

    {"layers": {"5": [{"op": "add", "vector": [0.1, ...], "scale": 2.0},
                      {"op": "cap", "vector": {"file": "direction.npy"}, "min": -1.0, "max": 1.0}],
                "10": [{"op": "ablation", "vector": {"file": "direction.npy"}, "scale": 0.0}]},
     "positions": ["prompt", 20, {"first": -4, "last": -1}]}

Layers count from 0. The operations of a layer run in list order. A vector is one of these:

* a list of hidden_size numbers;
* `{"file": "x.npy"}`: a NumPy file with one array of that shape. Its name is relative to the document;
* `{"file": "x.safetensors", "tensor": "name"}`: a tensor of a safetensors file.

`scale`, `min` and `max` are optional, as in AddSpec, ProjectionCapSpec and AblationSpec. `positions` selects the
positions that are steered; the default is all. It is "prompt", "generated", a slice of the generated tokens such as
"generated[0:8]" (without its end, as in Python), a message of a chat such as "messages[-1]", all messages of a role
such as "roles[user]", "skip_special_tokens", a position, a range, or a list of these.
A range includes both ends: `first` defaults to 0, and without `last` it is open. The first prompt token has position 0,
the last prompt token also -1. An operation may have `positions` of its own, which replace those of the document,
`max_relative_change` and `keep_norm`, and an addition "scaling": "relative", as in AddSpec. `"report_change": true` in
the document makes the receipt say how much each layer changed its rows. In place of the list of its operations, a layer
may have `{"hook": "residual_stream", "operations": [...]}`, with the HookPoint that they act on. A name that is not
known is refused, never ignored.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from steer_service.core.arrays import Float32Array
from steer_service.core.errors import InvalidRequest, within
from steer_service.core.field_checks import check_layer
from steer_service.core.hook_point import HookPoint
from steer_service.core.positions import PositionRange, PositionScope, scope_from, words_of
from steer_service.core.specs import (
    AblationSpec,
    AddScaling,
    AddSpec,
    LayerSteeringSpec,
    ProjectionCapSpec,
    SteeringOp,
    SteeringSpec,
)
from steer_service.formats.safetensors_file import LazyTensors
from steer_service.formats.unique_json import parse_json

PutVector = Callable[[str, Float32Array], Any]
"""(unique name, vector) -> the value for the vector in the document."""

OPERATIONS: dict[str, type[SteeringOp]] = {"add": AddSpec, "cap": ProjectionCapSpec, "ablation": AblationSpec}
"""The value of `op` -> its class."""

NUMBERS: dict[str, tuple[str, ...]] = {"add": ("scale",), "cap": ("min", "max"), "ablation": ("scale",)}
"""The value of `op` -> the numbers it takes besides its vector."""

_NEGATIVE = re.compile(r"-\d+", re.ASCII)
_OPTIONS = ("positions", "max_relative_change", "keep_norm")
"""What every operation takes."""


def spec_from_text(text: str, folder: Path = Path()) -> SteeringSpec:
    """The spec that the JSON `text` describes; names of vector files are relative to `folder`.

    Raises InvalidRequest for text that is not JSON, has a duplicate name, or does not describe a spec.
    """
    try:
        document = parse_json(text, field="steering", parse_int=float)
    except ValueError as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest(f"not JSON: {error}", reason="BAD_JSON", field="steering") from error
    return spec_from_json(document, folder)


def spec_from_json(document: Any, folder: Path = Path()) -> SteeringSpec:
    """The spec that the parsed JSON `document` describes; names of vector files are relative to `folder`.

    Raises InvalidRequest for what does not describe a spec, and for a file of a vector that cannot be read.
    """
    with within("steering"):
        fields = _object(document, required=("layers",), optional=("positions", "report_change"))
        layers = fields["layers"]
        with within("layers"):
            _check_kind(layers, Mapping, "an object of layers")
        return SteeringSpec(
            layers={_layer_from(key): _layer_spec_from(key, layers[key], folder) for key in layers},
            positions=_positions_from(fields.get("positions")),
            report_change=fields.get("report_change", False),
        )


def as_list(name: str, vector: Float32Array) -> Any:
    """The vector as a list of numbers in the document."""
    return vector.tolist()


def spec_to_json(spec: SteeringSpec, put: PutVector = as_list) -> dict[str, Any]:
    """`spec` as a document that `spec_from_json` reads back as an equal spec; `put` writes each vector once."""
    layers = {
        str(layer): [
            _operation_to_json(operation, put(f"layers.{layer}.{index}", operation.vector))
            for index, operation in enumerate(layer_spec.operations)
        ]
        for layer, layer_spec in spec.layers.items()
    }
    document: dict[str, Any] = {"layers": layers}
    if spec.positions is not None:
        document["positions"] = _positions_to_json(spec.positions)
    if spec.report_change:
        document["report_change"] = True
    return document


def _positions_from(value: Any) -> PositionScope | None:
    with within("positions"):
        items = value if isinstance(value, list) else [value]
        return None if value is None else scope_from([_position_item(item) for item in items])


def _position_item(item: Any) -> str | int | PositionRange:
    if isinstance(item, str):
        return item
    if not isinstance(item, Mapping):
        return _integer(item)
    ends = _object(item, required=(), optional=("first", "last"))
    first, last = ends.get("first"), ends.get("last")
    return PositionRange(0 if first is None else _integer(first), None if last is None else _integer(last))


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
        raise InvalidRequest(f"{value!r} is not a position", reason="BAD_POSITION")
    return int(value)


def _positions_to_json(scope: PositionScope) -> list[Any]:
    ranges = [
        {"first": item.first} if item.last is None else {"first": item.first, "last": item.last}
        for item in scope.ranges
    ]
    return [*words_of(scope), *ranges]


def _layer_from(key: str) -> int:
    if _NEGATIVE.fullmatch(key):
        with within(f"layers[{key}]"):
            check_layer(int(key))
    if not key.isdecimal() or str(int(key)) != key:
        raise InvalidRequest(f'layer {key!r} is not a number such as "5"', reason="BAD_LAYER", field="layers")
    return int(key)


def _layer_spec_from(key: str, layer: Any, folder: Path) -> LayerSteeringSpec:
    with within(f"layers[{key}]"):
        fields: Mapping[str, Any] = {"operations": layer}
        if isinstance(layer, Mapping):
            fields = _object(layer, required=("operations",), optional=("hook",))
        operations = fields["operations"]
        _check_kind(operations, list, "a list of operations")
        return LayerSteeringSpec(
            operations=tuple(_operation_from(index, operation, folder) for index, operation in enumerate(operations)),
            hook=fields.get("hook", HookPoint.RESIDUAL_STREAM),
        )


def _operation_from(index: int, document: Any, folder: Path) -> SteeringOp:
    with within(f"operations[{index}]"):
        _check_kind(document, Mapping, "an object")
        op = document.get("op")
        if not isinstance(op, str) or op not in OPERATIONS:
            raise InvalidRequest(f"op {op!r} is not one of {', '.join(OPERATIONS)}", reason="BAD_JSON", field="op")
        known = (*NUMBERS[op], *_OPTIONS, *(("scaling",) if op == "add" else ()))
        fields = _object(document, required=("op", "vector"), optional=known)
        numbers = (*NUMBERS[op], "max_relative_change")
        options: dict[str, Any] = {name: fields[name] for name in ("scaling", "keep_norm") if name in fields}
        options |= {name: _number(name, fields[name]) for name in numbers if fields.get(name) is not None}
        options["positions"] = _positions_from(fields.get("positions"))
        return OPERATIONS[op](vector=_vector_from(fields["vector"], folder), **options)


def _operation_to_json(operation: SteeringOp, vector: Any) -> dict[str, Any]:
    op = next(name for name, kind in OPERATIONS.items() if kind is type(operation))
    numbers = {name: getattr(operation, name) for name in NUMBERS[op]}
    given: dict[str, Any] = {name: value for name, value in numbers.items() if value is not None}
    if operation.positions is not None:
        given["positions"] = _positions_to_json(operation.positions)
    if operation.max_relative_change is not None:
        given["max_relative_change"] = operation.max_relative_change
    if operation.keep_norm:
        given["keep_norm"] = True
    if isinstance(operation, AddSpec) and operation.scaling is not AddScaling.ABSOLUTE:
        given["scaling"] = operation.scaling.value
    return {"op": op, "vector": vector, **given}


def _vector_from(value: Any, folder: Path) -> Any:
    if not isinstance(value, Mapping):
        with within("vector"):
            _check_kind(value, list, 'a list of numbers or {"file": "x.npy"}')
        return value
    with within("vector"):
        place = _object(value, required=("file",), optional=("tensor",))
        for key, name in place.items():
            with within(key):
                _check_kind(name, str, "a name")
        if "tensor" in place:
            return _tensor(folder / place["file"], **place)
        with within("file"):
            return _load(folder / place["file"], place["file"])


def _load(path: Path, name: str) -> Any:
    try:
        array = np.load(path, allow_pickle=False)  # a pickle could run code
    except (OSError, ValueError, EOFError) as error:
        raise InvalidRequest(f"{name} is not a readable NumPy file", reason="BAD_VECTOR") from error
    if not isinstance(array, np.ndarray):
        raise InvalidRequest(f"{name} holds several arrays, expected a .npy file", reason="BAD_VECTOR")
    return array


def _tensor(path: Path, file: str, tensor: str) -> Any:
    try:
        return LazyTensors(path)[tensor]
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{file} is not a readable safetensors file", reason="BAD_VECTOR", field="file") from error
    except KeyError as error:
        raise InvalidRequest(f"{file} has no {tensor!r}", reason="BAD_VECTOR", field="tensor") from error


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"{value!r} is not a number", reason="BAD_JSON", field=name)
    return float(value)


def _object(value: Any, *, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> Mapping[str, Any]:
    _check_kind(value, Mapping, "an object")
    for name in value:
        if name not in required + optional:
            known = ", ".join(required + optional)
            raise InvalidRequest(f"{name!r} is unknown; expected one of {known}", reason="BAD_JSON", field=name)
    for name in required:
        if name not in value:
            raise InvalidRequest(f"{name!r} is missing", reason="BAD_JSON", field=name)
    checked: Mapping[str, Any] = value
    return checked


def _check_kind(value: Any, kind: type, expected: str) -> None:
    if not isinstance(value, kind):
        raise InvalidRequest(f"expected {expected}, got {type(value).__name__}", reason="BAD_JSON")
