"""The layer that the name of a file or a key means; what may mean two is refused."""

import pytest

from steer_service.core.errors import InvalidRequest
from steer_service.formats.layouts.layer_names import layer_of_file_name, layer_of_key


@pytest.mark.parametrize(
    "name",
    ["vec_layer_13_x.pt", "layer_13.pt", "L13.pt", "l13.npy", "layer13.npz", "happy.layer.13.pt", "block_13.pt",
     "x-L13-y.safetensors", "layer 13.pt", "layers.13.pt", "layer_13_L13.pt", "blocks.13.hook_resid_post.npy",
     "blocks.14.hook_resid_pre.npy", "layer_13_v2_7b.pt", "layer_13_of_30_v2.pt",
     "vec_layer_13_Llama-2-7b-chat-hf.pt", "layer_13_20240101.pt", "L13_7b.pt"],
)  # fmt: skip
def test_a_file_is_named_after_its_layer(name: str) -> None:
    assert layer_of_file_name(name) == 13


@pytest.mark.parametrize(
    "name", ["axis.pt", "llama-2-13b.pt", "13.pt", "all13.pt", "hidden13.npy", "layer.pt", "v2.pt"]
)
def test_a_name_without_a_layer_names_none(name: str) -> None:
    assert layer_of_file_name(name) is None


@pytest.mark.parametrize(
    "name",
    ["layer_13_layer_14.pt", "layer-1.pt", "layer_13-15.pt", "layers_46:54.pt", "layer_13_l2.pt", "layer13.5.pt",
     "layers_10_20.pt", "layer_13to15.pt", "layer_10_and_20.pt", "layer10,12.pt", "refusal_l2.npy", "L1.pt",
     "direction_l2_norm.npy", "l2norm.npy", "L3_8B_x.pt", "last_layer_3.pt", "n_layers_30.pt", "layer_7b.pt"],
)  # fmt: skip
def test_a_name_that_may_mean_another_layer_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="more than one layer, or none; --layer"):
        layer_of_file_name(name)


@pytest.mark.parametrize(
    "key",
    [13, "13", "layer_13", "layer.13", "layer13", "L13", "layers.13", "model.layers.13", "transformer.h.13",
     "gpt_neox.layers.13", "model.language_model.layers.13", "model.layers.13.output", "blocks.13",
     "blocks.13.hook_resid_post", "blocks.14.hook_resid_pre", "blocks.13.hook_out", "blocks.14.hook_in",
     "direction.13"],
)  # fmt: skip
def test_a_key_names_its_layer(key: object) -> None:
    assert layer_of_key(key) == 13


@pytest.mark.parametrize("key", ["x", "", "axis", "layer_", "layer_1_2", "13.0", 1.5, None, True, (1,), "१३"])
def test_another_key_names_none(key: object) -> None:
    assert layer_of_key(key) is None


@pytest.mark.parametrize(
    "key", ["blocks.13.hook_resid_mid", "blocks.13.attn.hook_out", "blocks.13.mlp.hook_in", "model.layers.13.mlp"]
)
def test_another_place_than_the_residual_stream_is_refused(key: str) -> None:
    with pytest.raises(InvalidRequest, match="another place than the residual stream"):
        layer_of_key(key)


def test_the_input_of_the_first_block_is_the_embeddings() -> None:
    with pytest.raises(InvalidRequest, match="embeddings"):
        layer_of_key("blocks.0.hook_resid_pre")


@pytest.mark.parametrize("key", [-(10**9), 10**9, "9" * 5000, "layer_99999"])
def test_a_layer_that_cannot_be_is_refused(key: object) -> None:
    with pytest.raises(InvalidRequest, match="is not a layer"):
        layer_of_key(key)


@pytest.mark.parametrize(("key", "layer"), [(-1, 29), ("-1", 29), (-30, 0), ("3", 3)])
def test_a_negative_layer_counts_from_the_last_one_of_the_model(key: object, layer: int) -> None:
    assert layer_of_key(key, 30) == layer


def test_a_negative_layer_needs_a_model_that_has_it() -> None:
    with pytest.raises(InvalidRequest, match="--layer-count") as refused:
        layer_of_key("-2")
    assert (refused.value.reason, refused.value.field) == ("NEEDS_OPTION", "layer_count")
    with pytest.raises(InvalidRequest, match="embeddings"):
        layer_of_key(-31, 30)
