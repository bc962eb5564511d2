"""Dictionaries: vectors under the names of layers, and one known entry."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steer_service.formats.vector_files import read_vectors
from tests.formats.layouts.files import HIDDEN, assert_layers, refusal, rows, write

VECTOR, OTHER = rows(2)


@pytest.mark.parametrize("suffix", [".pt", ".npz", ".safetensors", ".json"])
@pytest.mark.parametrize(
    ("key", "layer"),
    [("layer_13", 13), ("layers.13", 13), ("13", 13), ("model.layers.13", 13), ("blocks.13.hook_resid_post", 13),
     ("blocks.13.hook_resid_pre", 12)],
)  # fmt: skip
def test_a_vector_is_read_under_the_name_of_its_layer(suffix: str, key: str, layer: int, tmp_path: Path) -> None:
    found = read_vectors(write(tmp_path / f"x{suffix}", {key: VECTOR, "layer_20": OTHER}), layer_count=30)
    assert_layers(found, {layer: VECTOR, 20: OTHER})
    assert found.kind == {".pt": "torch", ".npz": "numpy", ".safetensors": "safetensors", ".json": "json"}[suffix]


def test_the_content_says_the_container_whatever_the_name_says(tmp_path: Path) -> None:
    torch.save({13: torch.from_numpy(VECTOR)}, tmp_path / "x.safetensors")
    write(tmp_path / "y.npz", {"layer_13": VECTOR}).rename(tmp_path / "y")
    for name, kind in (("x.safetensors", "torch"), ("y", "numpy")):
        assert read_vectors(tmp_path / name).kind == kind


def test_what_is_about_a_file_changes_no_vector_and_what_is_not_known_is_refused(tmp_path: Path) -> None:
    found = read_vectors(write(tmp_path / "x.pt", {"model_name": "llama", "layer_3": VECTOR}))
    assert_layers(found, {3: VECTOR})
    assert found.model_hint == "llama"
    message = refusal(write(tmp_path / "x.pt", {"scale": 2.0, "layer_3": VECTOR}), "UNKNOWN_LAYOUT")
    for said in ("'scale': 2.0", "'layer_3': float32 [6]", 'torch.load("x.pt", weights_only=True)', "simple_add(layer"):
        assert said in message


@pytest.mark.parametrize("key", ["vector", "direction", "steering_vector"])
def test_a_vector_may_have_its_layer_beside_it(key: str, tmp_path: Path) -> None:
    assert_layers(read_vectors(write(tmp_path / "x.pt", {key: VECTOR, "layer": 7})), {7: VECTOR})
    assert_layers(read_vectors(write(tmp_path / "layer_8.pt", {key: VECTOR})), {8: VECTOR})
    refusal(write(tmp_path / "x.pt", {key: VECTOR}), "NEEDS_OPTION", "layer")
    refusal(write(tmp_path / "x.pt", {key: VECTOR, "layer": -1}), "UNKNOWN_LAYOUT")
    refusal(write(tmp_path / "x.pt", {key: rows(3), "layer": 1}), "UNKNOWN_LAYOUT")
    refusal(write(tmp_path / "x.pt", {"axis": rows(30)}), "NEEDS_OPTION", "rows")


def test_layers_are_there_once_and_have_one_vector(tmp_path: Path) -> None:
    assert "twice" in refusal(write(tmp_path / "x.pt", {"3": VECTOR, "layer_3": OTHER}), "UNKNOWN_LAYOUT")
    refusal(write(tmp_path / "x.pt", {"3": VECTOR, "4": OTHER[:3]}), "WRONG_WIDTH")
    refusal(write(tmp_path / "x.pt", {"3": rows(2)}), "BAD_SHAPE")
    refusal(write(tmp_path / "x.pt", {"3": VECTOR}), "UNKNOWN_LAYER", "layer", layer=4)
    assert "layer 40 is outside 0..29" in refusal(
        write(tmp_path / "x.pt", {40: VECTOR}), "UNKNOWN_LAYER", layer_count=30
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_every_real_dtype_becomes_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    vector = torch.arange(HIDDEN).to(dtype)
    torch.save({"layer_3": vector}, tmp_path / "x.pt")
    assert_layers(read_vectors(tmp_path / "x.pt"), {3: np.arange(HIDDEN, dtype=np.float32)})


def steering_vector_of_vllm_lens(**changes: Any) -> dict[str, Any]:
    return {"activations": rows(2), "layer_indices": [3, 9], "scale": 2.0, "norm_match": True,
            "position_indices": None} | changes  # fmt: skip


def test_a_steering_vector_of_vllm_lens_has_its_scale_and_keeps_norms(tmp_path: Path) -> None:
    spec = read_vectors(write(tmp_path / "x.pt", steering_vector_of_vllm_lens()), layer_count=10).to_spec(0.5)
    assert list(spec.layers) == [3, 9]
    for row, layer in enumerate(spec.layers.values()):
        [added] = layer.operations
        np.testing.assert_allclose(added.materialize(), rows(2)[row], rtol=1e-6)
        assert added.keep_norm
    for changes in ({"position_indices": [1]}, {"activations": rows(2, 2)}, {"layer_indices": [3]}, {"scale": "x"}):
        refusal(write(tmp_path / "x.pt", steering_vector_of_vllm_lens(**changes)), "UNKNOWN_LAYOUT")
