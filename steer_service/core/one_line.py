"""A repr of data on one line: arrays by their shape, and long values cut."""

import dataclasses
from collections.abc import Iterable, Sequence
from enum import Enum
from types import MappingProxyType
from typing import Any

import numpy as np

WIDTH = 120
"""Characters of a repr at most."""

VALUE_WIDTH = 60
"""Characters of a text in it at most."""

SHOWN = 3
"""Elements of a sequence or mapping that are shown at most."""

END = "...)"


def one_line(data: Any) -> str:
    """The repr of a dataclass or NamedTuple, at most WIDTH characters; fields that have their default are left out.

    An array is shown by its dtype and shape, and a vector also by its norm. Set as `__repr__` in a class.
    """
    shown = ", ".join(f"{name}={_described(value)}" for name, value in _shown_fields(data))
    text = f"{type(data).__name__}({shown})"
    return text if len(text) <= WIDTH else f"{text[: WIDTH - len(END)]}{END}"


def layers_shown(layers: Sequence[int]) -> str:
    """Layers in a few words: `layer 5`, `layers 2, 5, 9`, `layers 0-29` or `16 layers of 0-30`."""
    first, last = min(layers, default=0), max(layers, default=0)
    if not layers:
        return "no layer"
    if len(layers) == 1:
        return f"layer {first}"
    if len(layers) == last - first + 1:
        return f"layers {first}-{last}"
    if len(layers) <= SHOWN:
        return f"layers {', '.join(map(str, sorted(layers)))}"
    return f"{len(layers)} layers of {first}-{last}"


def _shown_fields(data: Any) -> Iterable[tuple[str, Any]]:
    if not dataclasses.is_dataclass(data):
        return ((name, getattr(data, name)) for name in data._fields)
    fields = (one for one in dataclasses.fields(data) if one.repr)
    pairs = ((one, getattr(data, one.name)) for one in fields)
    return ((one.name, value) for one, value in pairs if not _is_default(one, value))


def _is_default(field: "dataclasses.Field[Any]", value: Any) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        return isinstance(value, list | tuple | dict) and not value
    return type(value) is type(field.default) and not isinstance(value, np.ndarray) and bool(value == field.default)


def _described(value: Any) -> str:
    match value:
        case np.ndarray():
            return _array(value)
        case str():
            return repr(value if len(value) <= VALUE_WIDTH else f"{value[:VALUE_WIDTH]}...")
        case bytes():
            return f"<{len(value)} bytes>"
        case Enum():
            return str(value) if not isinstance(value, str) else repr(value.value)
        case list():
            return f"[{_first(map(_described, value[:SHOWN]), len(value))}]"
        case tuple() if not hasattr(value, "_fields"):
            return f"({_first(map(_described, value[:SHOWN]), len(value))}{',' * (len(value) == 1)})"
        case dict() | MappingProxyType():
            items = (f"{key!r}: {_described(value[key])}" for key, _ in zip(value, range(SHOWN), strict=False))
            return f"{{{_first(items, len(value))}}}"
    return " ".join(repr(value).split())


def _first(shown: Iterable[str], count: int) -> str:
    return ", ".join((*shown, f"{count - SHOWN} more") if count > SHOWN else shown)


def _array(array: "np.ndarray[Any, Any]") -> str:
    kind = f"{array.dtype}{list(array.shape)}"
    is_vector = array.ndim == 1 and not np.issubdtype(array.dtype, np.integer) and array.dtype != bool
    return f"<{kind}, norm {np.linalg.norm(array.astype(np.float32)):.4g}>" if is_vector else f"<{kind}>"
