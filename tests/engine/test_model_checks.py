"""Models that are refused because vLLM computes something else than their config says, without an engine."""

import importlib
import inspect
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, PretrainedConfig

from steer_service.core.errors import Unsupported
from steer_service.engine.worker.layer_outputs import LAYER_OUTPUTS, VLLM
from steer_service.engine.worker.model_checks import ASSUMED, check_model

pytestmark = [pytest.mark.engine]

WINDOW = 8

MODEL_TYPES = {"commandr": "cohere", "ernie45_moe": "ernie4_5_moe"}
"""Module of vLLM -> transformers' name of the family, where it is another."""

SETTINGS = [(name, setting) for name, assumed in ASSUMED.items() for setting in assumed]

OTHERS: dict[str, Any] = {
    "activation": "relu",
    "clip_qkv": 0.5,
    "hidden_act": "gelu",
    "moe_norm_min": 0.5,
    "swiglu_limit": 1.0,
}
"""Values that vLLM does not compute with, where it is not the opposite."""


def class_named(name: str) -> type[torch.nn.Module]:
    module, _, kind = name.rpartition(".")
    found: type[torch.nn.Module] = getattr(importlib.import_module(VLLM + module), kind)
    return found


def config_of(name: str, **settings: Any) -> Any:
    module = name.partition(".")[0]
    return CONFIG_MAPPING[MODEL_TYPES.get(module, module)](**settings)


def model_of(layer: torch.nn.Module) -> torch.nn.Module:
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList([layer])
    return model


def bare(kind: type[torch.nn.Module]) -> torch.nn.Module:
    """A layer of this class without its parts."""
    layer = kind.__new__(kind)
    torch.nn.Module.__init__(layer)
    return layer


def windowed(window: int | None) -> torch.nn.Module:
    """A layer whose attention has this window."""
    layer = torch.nn.Module()
    layer.attention = torch.nn.Module()
    layer.attention.sliding_window = window
    return layer


def vllms(config: Any, max_model_len: int = 64) -> SimpleNamespace:
    return SimpleNamespace(
        hf_text_config=config,
        max_model_len=max_model_len,
        disable_sliding_window=False,
        get_sliding_window=lambda: getattr(config, "sliding_window", None),
    )


@pytest.mark.parametrize(("name", "setting"), SETTINGS)
def test_a_setting_that_vllm_does_not_read_is_refused_by_name(name: str, setting: str) -> None:
    layer = bare(class_named(name))
    other = OTHERS.get(setting, not ASSUMED[name][setting][0])

    check_model(model_of(layer), vllms(config_of(name)))
    check_model(model_of(layer), vllms(config_of(name, **{setting: ASSUMED[name][setting][0]})))
    with pytest.raises(Unsupported, match=f"has {setting} {other!r}, and vLLM's") as refused:
        check_model(model_of(layer), vllms(config_of(name, **{setting: other})))
    assert refused.value.reason == "UNKNOWN_ARCHITECTURE"


@pytest.mark.parametrize(("name", "setting"), SETTINGS)
def test_a_setting_that_is_refused_is_one_that_vllm_still_does_not_read(name: str, setting: str) -> None:
    assert VLLM + name in LAYER_OUTPUTS
    source = inspect.getsource(importlib.import_module(class_named(name).__module__))
    assert not re.search(rf'config\.{setting}\b|"{setting}"', source)


def test_a_window_that_transformers_ignores_is_refused() -> None:
    model = model_of(windowed(WINDOW))

    with pytest.raises(
        Unsupported, match=r"layer 0 has a window of 8 tokens, and LlamaConfig knows none.*max-model-len"
    ):
        check_model(model, vllms(config_of("llama", sliding_window=WINDOW)))
    check_model(model, vllms(config_of("llama", sliding_window=WINDOW), max_model_len=WINDOW))
    mixed = config_of("llama", sliding_window=WINDOW, num_hidden_layers=1, layer_types=["sliding_attention"])
    with pytest.raises(Unsupported, match="LlamaConfig knows none"):
        check_model(model, vllms(mixed))
    check_model(model_of(windowed(None)), vllms(config_of("llama")))


@pytest.mark.parametrize("family", ["mistral", "mixtral", "phi3", "starcoder2"])
def test_a_window_of_a_family_that_has_one_is_taken(family: str) -> None:
    check_model(model_of(windowed(WINDOW)), vllms(config_of(family, sliding_window=WINDOW)))


def test_a_config_of_no_family_may_have_a_window() -> None:
    config = PretrainedConfig.from_dict({"sliding_window": WINDOW})  # as vLLM makes one of Mistral's own format

    check_model(model_of(windowed(WINDOW)), vllms(config))
