"""What a file holds, whatever its container: dicts, lists, text, numbers and arrays that are read when needed.

The first bytes decide the container, and the ending of the name where they say nothing. Nothing in a file is executed:
torch reads weights only, NumPy takes no pickles.
"""

import math
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors import safe_open

from steer_service.core.errors import InvalidRequest, SteerError
from steer_service.formats import safetensors_file as _registers_bfloat16  # noqa: F401
from steer_service.formats.layouts.lm_eval import table_of_lm_eval
from steer_service.formats.layouts.open_file import EXPECTED
from steer_service.formats.layouts.stored_array import UNREADABLE, StoredArray, Tree, stored
from steer_service.formats.torch_vectors import read_content as read_torch_content
from steer_service.formats.unique_json import parse_json
from steer_service.formats.zip_entries import check_growth

SUFFIXES = {
    ".gguf": "gguf", ".safetensors": "safetensors", ".npy": "numpy", ".npz": "numpy", ".json": "json",
    ".pt": "torch", ".pth": "torch", ".bin": "torch", ".ckpt": "torch", ".csv": "table",
}  # fmt: skip
"""Ending of a name -> container, where the first bytes say nothing."""

MAX_JSON_BYTES = 1 << 28
"""Bytes of a JSON file at most: parsed numbers take several times their text."""


def check_readable(path: Path) -> None:
    """Raises InvalidRequest for what is neither a folder nor a regular file: a pipe would be waited for without end."""
    try:
        exists, is_special = path.exists(), not (path.is_dir() or path.is_file())
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InvalidRequest(f"{path.name:.80} cannot be read: {why}", reason="NO_FILE", field="path") from error
    if not exists:
        raise InvalidRequest(f"there is no {path.name}; {EXPECTED}", reason="NO_FILE", field="path")
    if is_special:
        raise InvalidRequest(
            f"{path.name} is not a regular file; save what it gives to one", reason="NO_FILE", field="path"
        )


def container_of(path: Path) -> str:
    """The container of a file: gguf, numpy, torch, safetensors, json or table; raises InvalidRequest for another.

    A table (.csv) is known so that its refusal says what to do with it.
    """
    check_readable(path)
    try:
        with path.open("rb") as file:
            head = file.read(64)
        if head.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(path) as archive:
                return "numpy" if any(name.endswith(".npy") for name in archive.namelist()) else "torch"
    except (*UNREADABLE, UnicodeError) as error:
        if not isinstance(error, zipfile.BadZipFile):
            raise InvalidRequest(f"{path.name} cannot be read", reason="NO_FILE", field="path") from error
    if head.startswith(b"GGUF"):
        return "gguf"
    if head.startswith(b"\x93NUMPY"):
        return "numpy"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40:
        return "safetensors"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"["):
        return "json"
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InvalidRequest(f"{path.name} is no known kind of file; {EXPECTED}", reason="UNKNOWN_LAYOUT", field="path")
    return SUFFIXES[suffix]


def read_file(path: Path, container: str) -> Any:
    """The content of a file in this container; raises InvalidRequest for one that is damaged or has code in it."""
    reader, reason = READERS[container]
    try:
        return reader(path)
    except SteerError:
        raise
    except UNREADABLE as error:
        raise InvalidRequest(f"{path.name} is not a {container} file: {error}", reason=reason, field="path") from error


def _read_numpy(path: Path) -> Any:
    with path.open("rb") as file:
        is_archive = file.read(2) == b"PK"
    if not is_archive:
        _check_header(path)
        return stored(np.load(path, mmap_mode="r", allow_pickle=False))
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
        if not entries:
            raise ValueError("it has no arrays")
        found = {}
        for entry in entries:
            check_growth(entry)
            name = entry.filename.removesuffix(".npy")
            if name in found:
                raise ValueError(f"the array {name!r:.60} is there twice; write each name once")
            found[name] = _stored_in_archive(path, name, *_header(archive, entry))
    return found


def _check_header(path: Path) -> None:
    with path.open("rb") as file:
        _read_header(file, path.stat().st_size)


def _header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> tuple[tuple[int, ...], str]:
    """(shape, dtype) of an array in an archive, without reading its numbers."""
    with archive.open(entry) as file:
        return _read_header(file, entry.file_size)


def _read_header(file: IO[bytes], size: int) -> tuple[tuple[int, ...], str]:
    """(shape, dtype) of an array in a file of `size` bytes; raises ValueError for a shape that it cannot hold.

    NumPy multiplies a shape in 64 bits, where a large one overflows.
    """
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not read")
    if any(length < 0 for length in shape) or math.prod(shape) * dtype.itemsize > size - file.tell():
        raise ValueError(f"its header has the shape {shape!s:.80}, and the file has no room for it: it is damaged")
    return shape, str(dtype)


def _stored_in_archive(path: Path, name: str, shape: tuple[int, ...], dtype: str) -> StoredArray:
    @cache
    def array() -> Any:
        with np.load(path, allow_pickle=False) as archive:
            return archive[name]

    return StoredArray(shape=shape, dtype=dtype, read=lambda index: array()[index])


def _read_safetensors(path: Path) -> Any:
    file = safe_open(path, framework="numpy")
    found: dict[str, StoredArray] = {}
    for name in file.keys():  # noqa: SIM118  # it is no mapping
        part = file.get_slice(name)
        found[name] = StoredArray(
            shape=tuple(part.get_shape()), dtype=str(part.get_dtype()), read=_slice_of(file, name)
        )
    return found


def _slice_of(file: Any, name: str) -> Callable[[tuple[int | slice, ...]], Any]:
    # An empty index is no slice for safetensors.
    return lambda index: file.get_slice(name)[index] if index else file.get_tensor(name)


def _read_json(path: Path) -> Any:
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{size} bytes of JSON are more than {MAX_JSON_BYTES}; .npy or .safetensors has no such limit")
    try:
        return Tree().convert(parse_json(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), field="path"))
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _refuse_table(path: Path) -> Any:
    with path.open("rb") as file:
        columns = file.readline(4096).decode("utf-8", "replace")
    raise InvalidRequest(
        table_of_lm_eval(path.name)
        if {"hookpoint", "feature_index"} <= set(columns.strip().split(","))
        else f"{path.name} is a table, which does not say what its rows are. These lines of Python make a file of it:\n"
        f'    rows = numpy.loadtxt("{path.name}", delimiter=",", dtype=numpy.float32)\n'
        '    numpy.save("rows.npy", rows)  # or one row: numpy.save("layer_13.npy", rows[13])',
        reason="UNKNOWN_LAYOUT",
        field="path",
    )


READERS: Mapping[str, tuple[Callable[[Path], Any], str]] = {
    "torch": (read_torch_content, "BAD_TORCH_FILE"),
    "safetensors": (_read_safetensors, "BAD_TENSORS"),
    "numpy": (_read_numpy, "BAD_TENSORS"),
    "json": (_read_json, "BAD_JSON"),
    "table": (_refuse_table, "UNKNOWN_LAYOUT"),
}
"""Container -> (its reader, the reason of the error for a damaged file). GGUF has a reader with its own layout."""
