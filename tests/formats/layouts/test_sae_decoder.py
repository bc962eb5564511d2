"""One feature of a sparse autoencoder, as SAELens, Gemma Scope and sparsify write it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from steer_service.formats.vector_files import read_vectors
from tests.formats.layouts.files import HIDDEN, assert_layers, refusal, rows, write

FEATURES = 20
DECODER = rows(FEATURES)
BIASES = {"b_dec": rows(), "b_enc": np.zeros(FEATURES, np.float32)}


def folder(path: Path, config: dict[str, Any] | None) -> Path:
    """A folder of SAELens."""
    tensors = {"W_dec": DECODER, "W_enc": np.ascontiguousarray(DECODER.T), **BIASES}
    safetensors.numpy.save_file(tensors, path / "sae_weights.safetensors")
    if config is not None:
        (path / "cfg.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("config", "layer"),
    [
        ({"hook_name": "blocks.13.hook_resid_post"}, 13),
        ({"metadata": {"hook_name": "blocks.13.hook_resid_pre"}, "d_in": HIDDEN, "d_sae": FEATURES}, 12),
        ({"metadata": {"hook_name": "blocks.2.hook_resid_pre", "hook_name_out": "blocks.5.hook_resid_post"}}, 5),
        ({"hook_point": "blocks.4.hook_resid_post"}, 4),
        ({"metadata": {"hook_name": "model.layers.12.output"}}, 12),
    ],
)
def test_the_configuration_says_the_layer(config: dict[str, Any], layer: int, tmp_path: Path) -> None:
    place = folder(tmp_path, config)
    for path in (place, place / "sae_weights.safetensors"):
        found = read_vectors(path, feature=7, layer_count=14, hidden_size=HIDDEN)
        assert_layers(found, {layer: DECODER[7]})
        assert f"feature 7 of {FEATURES}; layer {layer}, from hook" in found.convention


def test_what_a_configuration_does_not_say_is_asked_for(tmp_path: Path) -> None:
    place = folder(tmp_path, {"d_in": HIDDEN})
    weights = place / "sae_weights.safetensors"
    assert f"it has {FEATURES} features; --feature" in refusal(weights, "NEEDS_OPTION", "feature")
    refusal(weights, "NEEDS_OPTION", "layer", feature=7)
    refusal(weights, "OUT_OF_RANGE", "feature", feature=FEATURES, layer=1)
    assert_layers(read_vectors(place, feature=0, layer=1), {1: DECODER[0]})
    for hook in ("blocks.3.hook_mlp_out", "blocks.3.attn.hook_z", "elsewhere"):
        (place / "cfg.json").write_text(json.dumps({"hook_name": hook}))
        refusal(weights, "UNKNOWN_LAYOUT", feature=7)
    (place / "cfg.json").write_text("no JSON")
    assert "cfg.json" in refusal(place, "UNKNOWN_LAYOUT", feature=7)


@pytest.mark.parametrize("width", [FEATURES, HIDDEN])
@pytest.mark.parametrize(("name", "is_transposed"), [("W_dec", False), ("w_dec", False), ("decoder.weight", True)])
def test_features_are_rows_or_columns_as_the_name_says(
    width: int, name: str, is_transposed: bool, tmp_path: Path
) -> None:
    decoder = rows(width)  # as many features as the hidden size says nothing
    stored = np.ascontiguousarray(decoder.T) if is_transposed else decoder
    for options in ({}, {"hidden_size": HIDDEN}):
        path = write(tmp_path / "params.npz", {name: stored})
        assert_layers(read_vectors(path, feature=3, layer=2, **options), {2: decoder[3]})


def test_the_bias_or_the_model_says_where_a_name_is_used_the_other_way_round(tmp_path: Path) -> None:
    transposed = np.ascontiguousarray(DECODER.T)
    path = write(tmp_path / "params.npz", {"W_dec": transposed, "b_dec": BIASES["b_dec"]})
    assert_layers(read_vectors(path, feature=3, layer=2), {2: DECODER[3]})
    path = write(tmp_path / "decoder.npy", transposed)
    assert_layers(read_vectors(path, feature=3, layer=2, hidden_size=HIDDEN), {2: DECODER[3]})
    message = refusal(path, "WRONG_WIDTH", feature=3, layer=2, hidden_size=8)
    assert "[6, 20] and the hidden size is 8" in message


@pytest.mark.parametrize(("name", "layer"), [("layers.5", 5), ("gpt_neox.layers.3", 3), ("blocks.4.hook_resid_pre", 3)])
def test_the_folder_of_sparsify_is_named_after_its_hook_point(name: str, layer: int, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    write(tmp_path / name / "sae.safetensors", {"W_dec": DECODER, "b_dec": BIASES["b_dec"]})
    found = read_vectors(tmp_path / name, feature=7)
    assert_layers(found, {layer: DECODER[7]})
    assert "from the name of the folder" in found.convention
    assert_layers(read_vectors(tmp_path / name, feature=7, layer=1), {1: DECODER[7]})


@pytest.mark.parametrize(("name", "reason"), [("layers.5.mlp", "UNKNOWN_LAYOUT"), ("5", "NEEDS_OPTION")])
def test_another_folder_of_sparsify_is_not_taken_for_a_layer(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    write(tmp_path / name / "sae.safetensors", {"W_dec": DECODER})
    refusal(tmp_path / name, reason, feature=7)


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ({"layer": 5, "submodule_name": "resid_post_layer_5"}, None),
        ({"layer": 5, "submodule_name": "mlp_out_layer_5"}, "not the residual stream after layer 5"),
        ({"layer": 5, "submodule_name": "resid_post_layer_6"}, "not the residual stream after layer 5"),
        ({"layer": 5, "submodule_name": None}, "--layer"),
        (None, "--layer"),
    ],
)
def test_the_configuration_of_dictionary_learning_says_the_layer(
    trainer: dict[str, Any] | None, said: str | None, tmp_path: Path
) -> None:
    write(tmp_path / "ae.pt", {"decoder.weight": np.ascontiguousarray(DECODER.T), "b_dec": BIASES["b_dec"]})
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    if said is None:
        assert_layers(read_vectors(tmp_path, feature=7), {5: DECODER[7]})
    else:
        assert said in refusal(tmp_path, "NEEDS_OPTION" if said == "--layer" else "UNKNOWN_LAYOUT", feature=7)
        assert_layers(read_vectors(tmp_path, feature=7, layer=2), {2: DECODER[7]})
