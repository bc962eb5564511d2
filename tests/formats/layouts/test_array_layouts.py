"""Arrays: the layer of a vector, and of each row, is said by the file, the model or the user, and never guessed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from steer_service.formats.vector_files import read_vectors, write_vectors
from tests.formats.layouts.files import HIDDEN, assert_layers, refusal, rows, write

VECTOR, AXIS = rows(), rows(30)
WITH_EMBEDDINGS = rows(31)


@pytest.mark.parametrize("suffix", [".pt", ".npy", ".json"])
def test_30_rows_of_a_30_layer_model_are_after_their_own_layer(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"axis{suffix}", AXIS)
    for options in ({"layer_count": 30}, {"rows": "after-layer"}, {"rows": "after-layer", "layer_count": 30}):
        found = read_vectors(path, **options)
        assert found.kind == "rows"
        assert_layers(found, dict(enumerate(AXIS)))


def test_30_rows_without_a_model_are_refused_until_their_order_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "axis.pt", AXIS)
    message = refusal(path, "NEEDS_OPTION", "rows")
    for said in ("float32 [30, 6]", "--layer-count", "--rows after-layer|embeddings-first"):
        assert said in message
    assert_layers(read_vectors(path, rows="embeddings-first"), dict(enumerate(AXIS[1:])))
    assert_layers(read_vectors(path, rows="after-layer", layer=21), {21: AXIS[21]})


def test_31_rows_of_a_30_layer_model_begin_with_the_embeddings(tmp_path: Path) -> None:
    path = write(tmp_path / "axis.pt", WITH_EMBEDDINGS)
    found = read_vectors(path, layer_count=30)
    assert found.kind == "persona"
    assert_layers(found, dict(enumerate(WITH_EMBEDDINGS[1:])))
    assert_layers(read_vectors(path, layer_count=31, layer=30), {30: WITH_EMBEDDINGS[30]})


@pytest.mark.parametrize("count", [29, 32, 40])
def test_other_numbers_of_rows_than_the_model_has_are_refused_with_both(count: int, tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "axis.pt", rows(count)), "WRONG_LAYER_COUNT", layer_count=30)
    assert f"{count} rows and the model 30 layers; expected 30, one after each layer, or 31 with" in message


def test_a_stated_order_is_refused_where_the_model_has_no_room_for_the_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "axis.pt", WITH_EMBEDDINGS)
    assert "at most 30 rows" in refusal(path, "WRONG_LAYER_COUNT", rows="after-layer", layer_count=30)
    assert len(read_vectors(path, rows="embeddings-first", layer_count=30).layers) == 30


@pytest.mark.parametrize(
    "name", ["vec_layer_13_Llama-2-7b-chat-hf.pt", "x_L13.npy", "layer13.npz", "blocks.13.hook_resid_post.pt"]
)
def test_one_vector_has_its_layer_in_the_name_of_its_file(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, {"arr_0": VECTOR} if name.endswith("npz") else VECTOR)
    found = read_vectors(path, layer_count=32, hidden_size=HIDDEN)
    assert_layers(found, {13: VECTOR})
    assert "layer 13, from the name of the file" in found.convention
    assert_layers(read_vectors(path, layer=4), {4: VECTOR})


@pytest.mark.parametrize("shape", [(HIDDEN,), (1, HIDDEN), (1, 1, HIDDEN)])
def test_one_vector_without_a_layer_needs_one(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = write(tmp_path / "v.npy", VECTOR.reshape(shape))
    assert "--layer (layer= in Python)" in refusal(path, "NEEDS_OPTION", "layer")
    assert_layers(read_vectors(path, layer=0), {0: VECTOR})


def test_a_list_of_vectors_is_rows(tmp_path: Path) -> None:
    torch.save([torch.from_numpy(row) for row in AXIS], tmp_path / "x.pt")
    assert_layers(read_vectors(tmp_path / "x.pt", layer_count=30), dict(enumerate(AXIS)))


def test_the_layer_of_refusal_direction_is_the_input_of_its_block(tmp_path: Path) -> None:
    path = write(tmp_path / "direction.pt", VECTOR)
    refusal(path, "NEEDS_OPTION", "layer")
    metadata = tmp_path / "direction_metadata.json"
    metadata.write_text(json.dumps({"pos": -1, "layer": 12}))
    found = read_vectors(path)
    assert found.kind == "refusal-direction"
    assert_layers(found, {11: VECTOR})
    metadata.write_text(json.dumps({"pos": -1, "layer": 0}))
    assert "the embeddings" in refusal(path, "UNKNOWN_LAYER")
    for content in ("", "[]", '{"layer": "x"}', '{"layer": 1e9}', '{"layer": true}'):
        metadata.write_text(content)
        assert "direction_metadata.json" in refusal(path, "UNKNOWN_LAYOUT")


def test_mean_diffs_of_refusal_direction_need_a_position_and_are_inputs_of_blocks(tmp_path: Path) -> None:
    diffs = rows(5, 30).astype(np.float64)
    path = write(tmp_path / "mean_diffs.pt", diffs)
    assert "vectors of 5 positions" in refusal(path, "NEEDS_OPTION", "position")
    refusal(path, "OUT_OF_RANGE", "position", position=5)
    found = read_vectors(path, position=-2, layer_count=30)
    assert found.kind == "refusal-direction"
    assert_layers(found, dict(enumerate(diffs[3, 1:].astype(np.float32))))
    assert_layers(read_vectors(path, position=3, layer=11), {11: diffs[3, 12].astype(np.float32)})
    refusal(path, "WRONG_LAYER_COUNT", position=0, layer_count=26)


def test_rows_by_position_of_another_name_need_their_order(tmp_path: Path) -> None:
    path = write(tmp_path / "states.npy", rows(5, 30))
    refusal(path, "NEEDS_OPTION", "rows", position=0, layer_count=30)
    assert_layers(read_vectors(path, position=0, rows="after-layer"), dict(enumerate(rows(5, 30)[0])))
    assert len(read_vectors(path, position=0, layer_count=29).layers) == 29


def test_a_vector_that_does_not_fit_the_model_is_refused_with_both_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "layer_13.npy", VECTOR)
    assert "has 6 numbers and the model's hidden size is 8" in refusal(path, "WRONG_WIDTH", hidden_size=8)
    assert "layer 13 is outside 0..12" in refusal(path, "UNKNOWN_LAYER", layer_count=13)
    axis = write(tmp_path / "axis.npy", AXIS)
    assert "have 6 numbers and the model's hidden size is 8" in refusal(axis, "WRONG_WIDTH", hidden_size=8)


def test_what_is_not_finite_or_zero_or_too_large_is_refused(tmp_path: Path) -> None:
    refusal(write(tmp_path / "layer_1.npy", VECTOR * np.nan), "NON_FINITE")
    refusal(write(tmp_path / "x.npy", AXIS * np.inf), "NON_FINITE", rows="after-layer")
    refusal(write(tmp_path / "x.npy", AXIS * 0), "UNKNOWN_LAYOUT", rows="after-layer")
    refusal(write(tmp_path / "x.npy", rows(5000)), "UNKNOWN_LAYOUT", rows="after-layer")
    refusal(write(tmp_path / "layer_1.npy", np.zeros(0)), "BAD_SHAPE")
    refusal(write(tmp_path / "layer_1.npy", VECTOR > 0), "BAD_VECTOR")


@pytest.mark.parametrize("options", [{"position": 0}, {"feature": 0, "layer": 1}, {"experiment": "e"}])
def test_an_option_that_says_nothing_of_the_file_is_refused(options: dict, tmp_path: Path) -> None:
    name = next(iter(options))
    refusal(write(tmp_path / "x.npz", {"layer_1": VECTOR}), "UNKNOWN_OPTION", name, **options)


@pytest.mark.parametrize(
    "options", [{"layer": -1}, {"layer": "x"}, {"rows": "x"}, {"position": 0.5}, {"feature": -1}, {"experiment": 1},
                {"layer_count": 0}, {"hidden_size": True}],
)  # fmt: skip
def test_an_option_that_cannot_be_is_refused_by_name(options: dict, tmp_path: Path) -> None:
    path = write(tmp_path / "x.npy", VECTOR)
    with pytest.raises(ValueError, match=next(iter(options))):
        read_vectors(path, **options)


def test_a_persona_file_without_its_last_layers_is_not_read_one_layer_late(tmp_path: Path) -> None:
    write_vectors(tmp_path / "p.pt", {5: rows(), 28: rows()}, kind="persona")  # 30 rows
    assert "row 0 is zeros" in refusal(tmp_path / "p.pt", "NEEDS_OPTION", "rows", layer_count=30)
    for options in ({"rows": "embeddings-first"}, {"kind": "persona"}):
        found = read_vectors(tmp_path / "p.pt", layer_count=30, **options)
        assert_layers(found, {5: rows(), 28: rows()})
