"""The walk along the paths of decoder layers."""

from types import SimpleNamespace

from steer_service.core.layer_paths import TRANSFORMERS_LAYER_PATHS, VLLM_LAYER_PATHS, attributes_at


def test_paths_that_exist_are_found_in_their_order() -> None:
    model = SimpleNamespace(model=SimpleNamespace(layers=[1], decoder=SimpleNamespace(layers=[2])), transformer=None)

    found = list(attributes_at(model, ("model.decoder.layers", "transformer.h", "other.layers", "model.layers")))

    assert found == [("model.decoder.layers", [2]), ("model.layers", [1])]


def test_both_engines_look_for_the_layers_of_a_llama_first() -> None:
    assert VLLM_LAYER_PATHS[0] == TRANSFORMERS_LAYER_PATHS[0] == "model.layers"
