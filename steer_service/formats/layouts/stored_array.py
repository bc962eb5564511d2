"""Arrays of a file that are read when they are needed, and a description of what a file holds."""

import math
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors import SafetensorError

from steer_service.core.arrays import Float32Array
from steer_service.core.errors import InvalidRequest
from steer_service.formats.layer_vectors import finite_vector

MAX_HIDDEN_SIZE = 1 << 17
"""Numbers of a vector at most: a small file may claim a vector that fills the memory."""

MAX_NUMBERS = 1 << 26
"""Numbers of one array of lists at most."""

UNREADABLE = (
    OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, OverflowError, MemoryError, EOFError,
    zipfile.BadZipFile, zlib.error, SafetensorError,
)  # fmt: skip
"""What readers of arrays raise for damaged files."""

Index = tuple[int | slice, ...]
"""Rows of the first axes to read; the axes that it leaves out are read as a whole."""

DESCRIBED = 6
"""Entries that a description names; the others are counted."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredArray:
    """An array in a file."""

    shape: tuple[int, ...]
    """Its shape."""
    dtype: str
    """The name of its dtype, for messages."""
    read: Callable[[Index], Any]
    """The part at an index, as `finite_vector` takes it; called for what `vector` has checked only."""

    def vector(self, *index: int | slice) -> Float32Array:
        """The vector at `index`, float32, shape [hidden_size].

        Raises InvalidRequest for another shape, for what is not finite and for what cannot be read.
        """
        rest = [self.shape[axis] for axis, at in enumerate(index) if isinstance(at, slice)]
        rest.extend(self.shape[len(index) :])
        if len(rest) != 1:
            raise InvalidRequest(f"expected a vector, got shape {rest}", reason="BAD_SHAPE")
        if not 0 < rest[0] <= MAX_HIDDEN_SIZE:
            raise InvalidRequest(
                f"a vector of {rest[0]} numbers is not one of 1..{MAX_HIDDEN_SIZE}", reason="BAD_SHAPE"
            )
        try:
            return finite_vector(self.read(index))
        except InvalidRequest:
            raise
        except UNREADABLE as error:
            raise InvalidRequest(f"an array cannot be read: {error}", reason="BAD_VECTOR") from error

    def only_vector(self) -> Float32Array:
        """The vector of an array of shape [..., 1, hidden_size]."""
        return self.vector(*(0,) * (len(self.shape) - 1))

    @property
    def is_one_vector(self) -> bool:
        """True for the shapes [hidden_size] and [..., 1, hidden_size]."""
        return bool(self.shape) and math.prod(self.shape[:-1]) == 1

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def stored(array: Any) -> StoredArray:
    """A NumPy array, mapped or in memory."""
    return StoredArray(shape=array.shape, dtype=str(array.dtype), read=lambda index: array[index])


def stacked(vectors: Sequence[StoredArray]) -> StoredArray:
    """Vectors of the same size as one array of shape [vectors, size]; they are read one by one."""
    return StoredArray(
        shape=(len(vectors), *vectors[0].shape),
        dtype=vectors[0].dtype,
        read=lambda index: vectors[_number(index[0])].read(index[1:]),
    )


def _number(at: int | slice) -> int:
    assert isinstance(at, int), "rows are read one by one"
    return at


class Tree:
    """Converts the content of a file to dicts with text or integer keys, lists, StoredArrays, text and numbers.

    Each object is converted once, however often it is there: a small file may name one list a billion times, or put a
    list into itself.
    """

    def __init__(self, leaf: Callable[[Any], Any] = lambda value: value) -> None:
        """`leaf` converts what is neither a dict nor a list."""
        self._leaf = leaf
        self._done: dict[int, Any] = {}

    def convert(self, value: Any, depth: int = 0) -> Any:
        """The converted `value`; raises InvalidRequest for one that is nested deeper than any layout."""
        if not isinstance(value, Mapping | list | tuple):
            return self._leaf(value)
        if id(value) not in self._done:
            if depth > 16:
                raise InvalidRequest("it is nested in itself or too deep", reason="UNKNOWN_LAYOUT", field="path")
            if isinstance(value, Mapping):
                found: Any = {key: self.convert(item, depth + 1) for key, item in value.items()}
            else:
                found = _numbers_or_list([self.convert(item, depth + 1) for item in value])
            self._done[id(value)] = found
        return self._done[id(value)]


class _InMemory(StoredArray):
    """An array that was made of lists."""


def _numbers_or_list(items: list[Any]) -> Any:
    """Numbers as an array of shape [n], arrays of numbers of one shape as one array, and anything else as it is."""
    if items and all(type(item) in (int, float) for item in items):
        try:
            return _in_memory(np.array(items, np.float64))
        except OverflowError:  # of an integer
            return items
    arrays = [item for item in items if isinstance(item, _InMemory)]
    if not items or len(arrays) < len(items) or len({array.shape for array in arrays}) > 1:
        return items
    if len(arrays[0].shape) >= 3 or len(arrays) * math.prod(arrays[0].shape) > MAX_NUMBERS:
        return items
    return _in_memory(np.stack([array.read(()) for array in arrays]))


def _in_memory(array: Any) -> StoredArray:
    return _InMemory(shape=array.shape, dtype="numbers", read=lambda index: array[index])


def described(content: Any) -> str:
    """What a file holds, for people: kind, shapes and keys, not more than a few of them."""
    if isinstance(content, StoredArray):
        return f"an array, {content}"
    if isinstance(content, Mapping):
        entries = [f"{key!r:.40}: {_in_short(content[key])}" for key in list(content)[:DESCRIBED]]
        return f"a dict of {_listed(entries, len(content))}" if content else "an empty dict"
    if isinstance(content, list):
        return f"a list of {_listed([_in_short(item) for item in content[:DESCRIBED]], len(content))}"
    return _in_short(content)


def _in_short(item: Any) -> str:
    match item:
        case StoredArray():
            return str(item)
        case Mapping():
            return "{" + ", ".join(f"{key!s:.24}" for key in list(item)[:DESCRIBED]) + "}"
        case list():
            return f"a list of {len(item)}"
        case str() | int() | float() | None:
            return f"{item!r:.40}" if not isinstance(item, int) or item.bit_length() < 128 else "a huge number"
    return f"a {type(item).__name__}"


def _listed(entries: list[str], count: int) -> str:
    more = f" and {count - len(entries)} more" if count > len(entries) else ""
    return f"{count}: {', '.join(entries)}{more}"
