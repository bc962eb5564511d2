"""Arrays by name in a file of the safetensors format, bfloat16 included; read without a copy.

The format (https://huggingface.co/docs/safetensors): eight bytes, little-endian, say how long the header is; the
header is JSON, filled up with spaces; the arrays' bytes follow, little-endian and without gaps. It is written here and
not with the `safetensors` package, whose NumPy side cannot read bfloat16 and which the client does not need otherwise;
a test reads the files with that package.
"""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import numpy.typing as npt

TYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "BOOL": np.dtype(np.bool_),
}
"""The format's names -> element types, as far as they are needed here."""

ALIGNMENT = 64
"""What the header's length is filled up to, in bytes, so that arrays begin where array libraries like them to."""

assert sys.byteorder == "little", "arrays are written as they lie in memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFile:
    """What a file holds."""

    tensors: Mapping[str, npt.NDArray[Any]]
    """Name -> array, a private mapping of the file: what is written to it changes nothing for others."""
    about: Mapping[str, str]
    """The file's `__metadata__`."""


def write_tensors(file: BinaryIO, tensors: Mapping[str, npt.NDArray[Any]], about: Mapping[str, str]) -> None:
    """Writes `tensors`, and what is to be known `about` them; raises KeyError for an element type without a name."""
    names = {dtype: name for name, dtype in TYPES.items()}
    # The widest elements come first, so that every array begins at a multiple of its element's size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].itemsize)
    header: dict[str, Any] = {"__metadata__": dict(about)}
    end = 0
    for name, array in ordered:
        header[name] = {
            "dtype": names[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [end, end + array.nbytes],
        }
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, array in ordered:
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def read_tensors(path: Path) -> TensorFile:
    """What `write_tensors` wrote to `path`, mapped; raises ValueError for another file, OSError for none."""
    memory = np.asarray(np.memmap(path, dtype=np.uint8, mode="c"))
    start = 8 + int.from_bytes(memory[:8].tobytes(), "little")
    try:
        header = json.loads(memory[8:start].tobytes())
        about = header.pop("__metadata__", {})
        return TensorFile(
            tensors={name: _array(memory[start:], **entry) for name, entry in header.items()}, about=about
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a safetensors file of this project") from error


def _array(memory: npt.NDArray[np.uint8], dtype: str, shape: list[int], data_offsets: list[int]) -> npt.NDArray[Any]:
    first, end = data_offsets
    element = TYPES[dtype]
    if not 0 <= first <= end <= memory.nbytes or end - first != math.prod(shape) * element.itemsize:
        raise ValueError("an array lies outside of the file")
    return memory[first:end].view(element).reshape(shape)
