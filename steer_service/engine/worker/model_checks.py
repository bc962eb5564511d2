"""Refuses loaded models whose layers are in the table but read more, or compute something else, than their config says.

Relies on (vLLM 0.24 to 0.33): a layer of Gemma 4 has `per_layer_input_gate`, None without per-layer embeddings;
`Attention.sliding_window`, in tokens, None for none. tests/engine/test_family_variants.py, test_model_checks.py and
test_seams.py notice a change.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from steer_service.core.errors import Unsupported
from steer_service.engine.worker.layer_outputs import VLLM, decoder_layers

WINDOWED = {"full_attention": False, "sliding_attention": True}
"""Kind of attention in a config's `layer_types` -> whether it has a window; other kinds are not checked."""

SILU = ("silu", "swish")

ASSUMED: Mapping[str, Mapping[str, tuple[object, ...]]] = {
    "afmoe.AfmoeDecoderLayer": {"attention_bias": (False,)},
    "cohere2_moe.Cohere2MoeDecoderLayer": {"attention_bias": (False,), "hidden_act": SILU},
    "commandr.CohereDecoderLayer": {"attention_bias": (False,), "hidden_act": SILU},
    "ernie45_moe.Ernie4_5_MoeDecoderLayer": {"moe_norm_min": (1e-12,)},
    "falcon.FalconDecoderLayer": {"activation": ("gelu",)},
    "gemma.GemmaDecoderLayer": {"attention_bias": (False,)},
    "gpt2.GPT2Block": {"scale_attn_weights": (True,)},
    "gpt_oss.TransformerBlock": {"attention_bias": (True,), "swiglu_limit": (7.0,)},
    "granitemoe.GraniteMoeDecoderLayer": {"attention_bias": (False,), "hidden_act": SILU},
    "granitemoeshared.GraniteMoeSharedDecoderLayer": {"attention_bias": (False,)},
    "minicpm3.MiniCPM3DecoderLayer": {"attention_bias": (False,)},
    "mixtral.MixtralDecoderLayer": {"hidden_act": SILU},
    "olmoe.OlmoeDecoderLayer": {
        "attention_bias": (False,),
        "clip_qkv": (None,),
        "hidden_act": SILU,
        "norm_topk_prob": (False,),
    },
    "stablelm.StablelmDecoderLayer": {
        "hidden_act": SILU,
        "qk_layernorm": (False,),
        "use_parallel_residual": (False,),
    },
}
"""Class of a layer in vLLM's models -> settings that transformers' class reads and it does not, and their values with
which it computes."""


def check_model(model: torch.nn.Module, model_config: Any) -> None:
    """Raises Unsupported for a model that the proof at start cannot judge, or that differs from its config.

    `model_config` is vLLM's.
    """
    for layer, module in enumerate(decoder_layers(model)):
        _check_inputs(layer, module)
        _check_settings(module, model_config.hf_text_config)
        _check_window(layer, module, model_config)


def _check_inputs(layer: int, module: torch.nn.Module) -> None:
    if getattr(module, "per_layer_input_gate", None) is not None or hasattr(module, "altup"):
        raise Unsupported(
            f"layer {layer} reads more than the residual stream: an embedding of its own for each token, as Gemma 3n "
            "and the small models of Gemma 4 have. The proof at start cannot tell whether steering is right there",
            reason="UNKNOWN_ARCHITECTURE",
        )


def _check_settings(module: torch.nn.Module, config: Any) -> None:
    kind = type(module)
    assumed = ASSUMED.get(f"{kind.__module__}.{kind.__qualname__}".removeprefix(VLLM), {})
    for name, values in assumed.items():
        given = getattr(config, name, values[0])
        if given not in values and (given or values[0]):  # None is as good as False
            raise Unsupported(
                f"the model's config has {name} {given!r}, and vLLM's {kind.__qualname__} does not read it: "
                f"it computes as with {values[0]!r}. Its rows would differ from those of transformers",
                reason="UNKNOWN_ARCHITECTURE",
            )


def _check_window(layer: int, module: torch.nn.Module, model_config: Any) -> None:
    config = model_config.hf_text_config
    if model_config.disable_sliding_window:
        return
    kinds, cure = getattr(config, "layer_types", None), ""
    if not _knows_windows(config):
        said, is_windowed = f"{type(config).__name__} knows none", False
        cure = "" if kinds else """, and so does --hf-overrides '{"sliding_window": null}'"""
    elif kinds and layer < len(kinds) and kinds[layer] in WINDOWED:
        said, is_windowed = f"the model's config says {kinds[layer]!r}", WINDOWED[kinds[layer]]
    else:
        return
    windows = [part.sliding_window for part in module.modules() if hasattr(part, "sliding_window")]
    narrow = [window for window in windows if isinstance(window, int) and window < model_config.max_model_len]
    if not windows or bool(narrow) == is_windowed:
        return
    if is_windowed and (model_config.get_sliding_window() or 0) >= model_config.max_model_len:
        return  # no request is long enough to notice
    found = f"has a window of {narrow[0]} tokens" if narrow else "has no window"
    raise Unsupported(
        f"vLLM's attention of layer {layer} {found}, and {said}: its rows would differ from those of "
        f"transformers. A --max-model-len of at most the window avoids the difference{cure}",
        reason="UNKNOWN_ARCHITECTURE",
    )


def _knows_windows(config: Any) -> bool:
    """False for a config of a family without windows: transformers ignores one there, vLLM gives it to every layer."""
    kind = type(config)
    if not getattr(kind, "model_type", ""):  # of no family, such as one of Mistral's own format
        return True
    return hasattr(kind, "sliding_window") or "sliding_window" in inspect.signature(kind.__init__).parameters
