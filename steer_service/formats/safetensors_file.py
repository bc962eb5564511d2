"""Safetensors files, read and written through NumPy, with bfloat16.

Checked with safetensors 0.5.3 and 0.8.0. What differs between them, or from what this project needs, is handled here.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # importing it registers the name "bfloat16", under which safetensors asks NumPy for the dtype
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "BOOL": np.dtype(np.bool_),
}
"""Name in the file -> dtype, for the dtypes that this project writes. A file with another dtype is refused."""

PT_METADATA = {"format": "pt"}
"""Metadata of a file of weights: some readers, transformers among them, refuse a file without it."""


class LazyTensors(Mapping[str, npt.NDArray[Any]]):
    """The tensors of a file by name. Each access reads that tensor alone, into an array of its own."""

    def __init__(self, path: Path) -> None:
        """Opens the file; raises ValueError for a file that this project did not write, OSError if there is none."""
        self._path = path
        try:
            self._file = safe_open(path, framework="numpy")
            dtypes = {name: self._file.get_slice(name).get_dtype() for name in self._file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise self._bad_file() from error
        self._names = tuple(dtypes)
        if not set(dtypes.values()) <= DTYPES.keys():
            raise self._bad_file()

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _bad_file(self) -> ValueError:
        return ValueError(f"{self._path} is not a safetensors file of this project")


def write_tensors(path: Path, tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Writes `tensors` to `path`, with at most one more copy of them in memory; raises OSError if that fails.

    `safetensors.numpy.save` would hold the file two to three times in memory.
    """
    assert all(array.dtype in DTYPES.values() for array in tensors.values())
    path.touch()
    mode = path.stat().st_mode
    try:
        # safetensors 0.8 writes the memory behind an array without regard to its strides.
        save_file({name: np.asarray(array, order="C") for name, array in tensors.items()}, path, dict(metadata))
    except SafetensorError as error:  # the arrays are valid, so the file could not be written
        raise OSError(str(error)) from error
    path.chmod(mode)  # safetensors 0.8 replaces the file by one that its owner alone may read
