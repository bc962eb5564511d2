"""Refuses loaded models whose layers are in the table but read more, or attend to less, than their config says.

Relies on (vLLM 0.24 to 0.33): a layer of Gemma 4 has `per_layer_input_gate`, None without per-layer embeddings;
`Attention.sliding_window`, in tokens, None for none. tests/engine/test_family_variants.py and test_seams.py notice a
change.
"""

from typing import Any

import torch

from steer_service.core.errors import Unsupported
from steer_service.engine.worker.layer_outputs import decoder_layers

WINDOWED = {"full_attention": False, "sliding_attention": True}
"""Kind of attention in a config's `layer_types` -> whether it has a window; other kinds are not checked."""


def check_model(model: torch.nn.Module, model_config: Any) -> None:
    """Raises Unsupported for a model that the proof at start cannot judge, or that differs from its config.

    `model_config` is vLLM's.
    """
    for layer, module in enumerate(decoder_layers(model)):
        _check_inputs(layer, module)
        _check_window(layer, module, model_config)


def _check_inputs(layer: int, module: torch.nn.Module) -> None:
    if getattr(module, "per_layer_input_gate", None) is not None or hasattr(module, "altup"):
        raise Unsupported(
            f"layer {layer} reads more than the residual stream: an embedding of its own for each token, as Gemma 3n "
            "and the small models of Gemma 4 have. The proof at start cannot tell whether steering is right there",
            reason="UNKNOWN_ARCHITECTURE",
        )


def _check_window(layer: int, module: torch.nn.Module, model_config: Any) -> None:
    kinds = getattr(model_config.hf_text_config, "layer_types", None)
    if not kinds or layer >= len(kinds) or kinds[layer] not in WINDOWED or model_config.disable_sliding_window:
        return
    windows = [part.sliding_window for part in module.modules() if hasattr(part, "sliding_window")]
    narrow = [window for window in windows if isinstance(window, int) and window < model_config.max_model_len]
    if not windows or bool(narrow) == WINDOWED[kinds[layer]]:
        return
    if WINDOWED[kinds[layer]] and (model_config.get_sliding_window() or 0) >= model_config.max_model_len:
        return  # no request is long enough to notice
    found = f"has a window of {narrow[0]} tokens" if narrow else "has no window"
    raise Unsupported(
        f"vLLM's attention of layer {layer} {found}, and the model's config says {kinds[layer]!r}: its rows would "
        "differ from those of transformers. A --max-model-len of at most the window avoids the difference",
        reason="UNKNOWN_ARCHITECTURE",
    )
