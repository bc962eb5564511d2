"""Any content gives vectors or InvalidRequest, and small files do not become large in memory."""

import io
import json
import os
import pickle
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steer_service.core.errors import InvalidRequest, Unsupported
from steer_service.formats.layer_vectors import Imported
from steer_service.formats.vector_files import read_vectors, write_vectors
from tests.formats.layouts.files import as_tensors, assert_layers, refusal, rows, write
from tests.formats.vectors import TouchesAFile

NAMES = st.sampled_from([
    "vector", "vectors", "axis", "default_mean", "layer_3", "3", "layers.3", "blocks.0.hook_resid_pre", "W_dec",
    "layer_activations", "layer_type", "experiments", "interventions", "id", "cap", "layer", "action", "b_dec",
    "steering_vector", "steering_coefficient", "bias", "activations", "layer_indices", "scale", "type", "role", "model",
])  # fmt: skip
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.sampled_from(["add", "clamp", "e"])
)
ARRAYS = st.builds(
    lambda shape, value: np.full(shape, value, np.float32),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    st.sampled_from([0.0, 1.5, np.nan, 1e38]),
)
CONTENT = st.recursive(
    LEAVES | ARRAYS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.integers(-2, 9), inner, max_size=4),
    max_leaves=12,
)
OPTIONS = st.fixed_dictionaries({}, optional={
    "layer": st.integers(0, 3), "rows": st.sampled_from(["after-layer", "embeddings-first"]),
    "position": st.integers(-2, 2), "feature": st.integers(0, 3), "experiment": st.just("e"),
    "layer_count": st.integers(1, 5), "hidden_size": st.integers(1, 4),
})  # fmt: skip


def read_or_refused(path: Path, **options: Any) -> Imported | None:
    """The vectors, or None for a file that is refused; any other error fails."""
    try:
        return read_vectors(path, **options)
    except InvalidRequest:
        return None


@pytest.mark.parametrize("suffix", [".pt", ".json"])
def test_arbitrary_content_gives_vectors_or_invalid_request(suffix: str, tmp_path: Path) -> None:
    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(content=CONTENT, options=OPTIONS)
    def check(content: Any, options: dict[str, Any]) -> None:
        path = tmp_path / f"x{suffix}"
        if suffix == ".pt":
            torch.save(as_tensors(content), path)
        else:
            path.write_text(json.dumps(content, default=np.ndarray.tolist))
        found = read_or_refused(path, **options)
        if found is not None:
            assert found.layer_numbers
            found.to_spec()

    check()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")  # torch, of a damaged file
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    head=st.sampled_from(
        [b"", b"PK\x03\x04", b"GGUF", b"\x93NUMPY\x01\x00", b"\x40" + b"\0" * 7 + b"{", b"{", b"\x80\x02"]
    ),
    tail=st.binary(max_size=80),
    suffix=st.sampled_from([".pt", ".npy", ".npz", ".safetensors", ".gguf", ".json", ".txt", ""]),
)
def test_arbitrary_bytes_give_invalid_request(head: bytes, tail: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(head + tail)
    read_or_refused(path, layer=1)


@pytest.mark.parametrize("name", ["x.pt", "x.npy", "layer_1.npz"])
def test_code_in_a_file_is_not_run(name: str, tmp_path: Path) -> None:
    touches = TouchesAFile(tmp_path / "touched")
    if name.endswith(".pt"):
        (tmp_path / name).write_bytes(pickle.dumps(touches, protocol=2))
    elif name.endswith(".npz"):
        np.savez(tmp_path / name, arr_0=np.array([touches]))
    else:
        np.save(tmp_path / name, np.array([touches]))
    refusal(tmp_path / name, "BAD_TORCH_FILE" if name.endswith(".pt") else "BAD_TENSORS")
    assert not (tmp_path / "touched").exists()


def many_lists(path: Path) -> None:
    nested: list[Any] = [1.0] * 10
    for _ in range(12):
        nested = [nested] * 10
    torch.save(nested, path)


def a_list_in_itself(path: Path) -> None:
    nested: list[Any] = []
    nested.append(nested)
    torch.save(nested, path)


def a_view(path: Path) -> None:
    torch.save(torch.ones(1).expand(1 << 40), path)


def a_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("layer_1.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (1 << 26,)})
        for _ in range(256):
            file.write(bytes(1 << 20))


def a_torch_bomb(path: Path) -> None:
    compress(write(path, rows()), path, more=bytes(1 << 28))


def compress(source: Path, path: Path, more: bytes = b"") -> None:
    """Writes the torch file `source` with compressed entries; `more` is appended to its pickle."""
    with zipfile.ZipFile(source) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content + more if name.endswith(".pkl") else content)


def test_a_compressed_torch_file_has_its_own_numbers(tmp_path: Path) -> None:
    numbers = np.arange(1000, dtype=np.int16) % 7  # any bytes are valid numbers
    write(tmp_path / "x.pt", {1: numbers, 2: numbers + 1, 3: numbers + 2})
    compress(tmp_path / "x.pt", tmp_path / "y.pt")
    assert_layers(read_vectors(tmp_path / "y.pt"), {1: numbers, 2: numbers + 1, 3: numbers + 2})


@pytest.mark.parametrize("shape", [(1 << 33, 1 << 33), (1 << 62, 8), (-1, 6), (7, 6)])
@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_a_shape_that_its_file_cannot_hold_is_refused(shape: tuple[int, int], name: str, tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    content = header.getvalue() + rows(6).tobytes()
    if name.endswith(".npy"):
        (tmp_path / name).write_bytes(content)
    else:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("arr_0.npy", content)
    assert "the file has no room for it" in refusal(tmp_path / name, "BAD_TENSORS", layer_count=6)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "layer_1.npy")
    assert "is not a regular file" in refusal(tmp_path / "layer_1.npy", "NO_FILE")


def test_a_path_that_cannot_be_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="name too long") as refused:
        read_vectors("x" * 5000)
    assert len(refused.value.message) < 300


@pytest.mark.parametrize("content", [{3: rows() * 0}, {"layer_activations": {3: rows() * 0}}, rows() * 0])
def test_a_file_whose_vectors_are_all_zero_is_refused(content: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "layer_3.pt", content)
    assert "every vector is zero" in refusal(path, "UNKNOWN_LAYOUT")


@pytest.mark.parametrize("make", [many_lists, a_list_in_itself, a_view, a_bomb, a_torch_bomb])
def test_a_small_file_does_not_become_large_in_memory(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "layer_1.pt"
    make(path)
    tracemalloc.start()
    with pytest.raises(InvalidRequest):
        read_vectors(path)
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


def test_one_row_of_a_large_array_is_read_without_the_others(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.lib.format.open_memmap(path, "w+", np.float32, (1 << 16, 256))[3] = rows(256).ravel()[:256]
    tracemalloc.start()
    read_vectors(path, feature=3, layer=1)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_json_that_is_nested_too_deep_is_refused(tmp_path: Path) -> None:
    for depth in (20, 200_000):
        (tmp_path / "x.json").write_text("[" * depth + "]" * depth)
        with pytest.raises(InvalidRequest):
            read_vectors(tmp_path / "x.json")
    refusal(write(tmp_path / "y.json", {"layer_1": ["1.5", "2"]}), "UNKNOWN_LAYOUT")


def test_without_torch_and_gguf_other_files_are_read_and_these_name_their_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for suffix in (".pt", ".npz", ".safetensors", ".json"):
        write(tmp_path / f"x{suffix}", {"layer_3": rows()})
    write_vectors(tmp_path / "x.gguf", {3: rows()}, kind="gguf")
    for package in ("torch", "gguf"):
        monkeypatch.setitem(sys.modules, package, None)  # importing it raises ImportError
    for suffix in (".npz", ".safetensors", ".json"):
        assert_layers(read_vectors(tmp_path / f"x{suffix}"), {3: rows()})
    for suffix, package in ((".pt", "torch"), (".gguf", "gguf")):
        with pytest.raises(Unsupported, match=f"pip install {package}") as refused:
            read_vectors(tmp_path / f"x{suffix}")
        assert refused.value.reason == f"NO_{package.upper()}"


@pytest.mark.parametrize(("component", "is_read"), [("hidden_states", True), (None, True), ("attention_heads", False)])
def test_a_gguf_of_easysteer_is_read_if_it_is_of_the_residual_stream(
    component: str | None, is_read: bool, tmp_path: Path
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "qwen2")
    writer.add_string("controlvector.easysteer", json.dumps({"version": 1, "component": component, "metadata": None}))
    writer.add_tensor("direction.3", rows())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if is_read:
        assert_layers(read_vectors(tmp_path / "x.gguf", layer_count=4), {3: rows()})
    else:
        assert "attention_heads" in refusal(tmp_path / "x.gguf", "UNKNOWN_LAYOUT")
