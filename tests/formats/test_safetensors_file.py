"""Safetensors files: what is written is read, here and by the format's own package."""

import json
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors import safe_open

from steer_service.formats.safetensors_file import DTYPES, LazyTensors, write_tensors


def arrays() -> dict[str, npt.NDArray[Any]]:
    """One of each dtype, some without rows, of lengths that are no multiple of anything, and a number."""
    numbers = np.random.default_rng(0).normal(size=(3, 5)) * 100
    return {
        **{f"{name}.some": numbers.astype(dtype) for name, dtype in DTYPES.items()},
        **{f"{name}.none": np.empty((0, 5), dtype) for name, dtype in DTYPES.items()},
        "number": np.array(2.5, np.float32),
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_tensors(tmp_path / "x.safetensors", arrays(), {"who": "me", "what": "ß"})
    return tmp_path / "x.safetensors"


def test_what_is_written_is_read(path: Path) -> None:
    held = LazyTensors(path)

    assert held.keys() == arrays().keys()
    for name, array in arrays().items():
        assert (held[name].dtype, held[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(held[name], array)
        assert held[name].flags.aligned
    with pytest.raises(KeyError, match="nothing"):
        held["nothing"]


def test_metadata_is_written(path: Path) -> None:
    with safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"who": "me", "what": "ß"}


def test_the_format_s_own_package_reads_it(path: Path) -> None:
    torch = pytest.importorskip("torch")

    with safe_open(path, framework="pt") as theirs:
        assert theirs.metadata() == {"who": "me", "what": "ß"}
        assert set(theirs.keys()) == set(arrays())
        for name, array in arrays().items():
            tensor = theirs.get_tensor(name)
            assert tensor.shape == array.shape
            np.testing.assert_array_equal(tensor.to(torch.float64).numpy(), array.astype(np.float64))


@pytest.mark.parametrize("changed", [np.transpose, np.asfortranarray, lambda array: array[:, ::2]])
def test_the_strides_of_an_array_do_not_matter(changed: Any, tmp_path: Path) -> None:
    array = changed(np.arange(15, dtype=np.float32).reshape(3, 5))

    write_tensors(tmp_path / "x", {"x": array}, {})

    np.testing.assert_array_equal(LazyTensors(tmp_path / "x")["x"], array)


def test_writing_to_what_was_read_does_not_change_the_file(path: Path) -> None:
    LazyTensors(path)["F32.some"][:] = 0

    assert LazyTensors(path)["F32.some"].all()


def test_only_the_tensor_that_is_asked_for_is_read(tmp_path: Path) -> None:
    size = 16 << 20
    write_tensors(tmp_path / "x", {name: np.ones(size, np.bool_) for name in "abcdefgh"}, {})
    before = resident_bytes()

    held = LazyTensors(tmp_path / "x")
    assert resident_bytes() - before < size
    assert held["c"].all()
    assert resident_bytes() - before < 4 * size


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_file_has_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    write_tensors(tmp_path / "x", arrays(), {})

    assert (tmp_path / "x").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert {path.name for path in tmp_path.iterdir()} == {"x", "other"}


def test_a_file_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_tensors(tmp_path / "none" / "x", arrays(), {})

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_tensors(tmp_path / "x", {"x": np.zeros(8192, np.float32)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]},
        {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]},
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
        LazyTensors(tmp_path / "x")


def test_a_file_that_is_cut_off_is_refused(path: Path) -> None:
    content = path.read_bytes()
    for length in (0, 7, 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="is not a safetensors file"):
            LazyTensors(path)


def test_no_file_is_an_os_error(tmp_path: Path) -> None:
    for path in (tmp_path / "x", tmp_path):
        with pytest.raises(OSError, match="No such"):
            LazyTensors(path)
