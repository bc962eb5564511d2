"""Files of tensors: what is written is read, by us and by the format's own package."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from steer_service.formats.tensor_file import TYPES, read_tensors, write_tensors


def arrays() -> dict[str, npt.NDArray[Any]]:
    """One of each type, some without rows, of lengths that are no multiple of anything."""
    numbers = np.random.default_rng(0).normal(size=(3, 5)) * 100
    return {f"{name}.some": numbers.astype(dtype) for name, dtype in TYPES.items()} | {
        f"{name}.none": np.empty((0, 5), dtype) for name, dtype in TYPES.items()
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with (tmp_path / "x.safetensors").open("wb") as file:
        write_tensors(file, arrays(), {"who": "me", "what": "ß"})
    return tmp_path / "x.safetensors"


def test_what_is_written_is_read(path: Path) -> None:
    held = read_tensors(path)

    assert held.about == {"who": "me", "what": "ß"}
    assert held.tensors.keys() == arrays().keys()
    for name, array in arrays().items():
        assert (held.tensors[name].dtype, held.tensors[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(held.tensors[name], array)
        assert held.tensors[name].flags.aligned


def test_the_format_s_own_package_reads_it(path: Path) -> None:
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors")

    with safetensors.safe_open(path, framework="pt") as theirs:
        assert theirs.metadata() == {"who": "me", "what": "ß"}
        assert set(theirs.keys()) == set(arrays())
        for name, array in arrays().items():
            tensor = theirs.get_tensor(name)
            assert tensor.shape == array.shape
            np.testing.assert_array_equal(tensor.to(torch.float64).numpy(), array.astype(np.float64))


def test_writing_to_what_was_read_does_not_change_the_file(path: Path) -> None:
    read_tensors(path).tensors["F32.some"][:] = 0

    assert read_tensors(path).tensors["F32.some"].all()


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [1]},
        None,
    ],
)
def test_another_file_is_refused(tmp_path: Path, entry: object) -> None:
    text = json.dumps({"x": entry}).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))

    with pytest.raises(ValueError, match="is not a safetensors file of this project"):
        read_tensors(tmp_path / "x")


def test_a_file_that_is_cut_off_is_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])

    with pytest.raises(ValueError, match="is not a safetensors file"):
        read_tensors(path)
