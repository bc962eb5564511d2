"""Tiny random models that also see, of which only the text is used here: one of each architecture that was compared."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4TextConfig,
    LlamaConfig,
    LlavaConfig,
    Mistral3Config,
    MistralConfig,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SiglipVisionConfig,
)

from tests.engine.families import BASE, HEAD, TIED, WIDTH, draw_weights
from tests.engine.family_variants import GEMMA4

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {"depth": 1, "num_heads": 2, "patch_size": 14}
QWEN_TOKENS = {"image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502, "vision_end_token_id": 503}
ROTARY = {"rope_type": "default", "mrope_section": [4, 6, 6]}

WITHOUT_IMAGES = {"limit_mm_per_prompt": {"image": 0, "video": 0}}
"""vLLM then loads no part that sees."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Multimodal:
    """How to make its model."""

    config: Callable[[], Any]
    """Makes transformers' config."""
    layer_class: str
    """The class of its decoder layers."""
    norm_weight: float = 1.0
    """Mean of the norms' weights."""


def _text(**other: Any) -> dict[str, Any]:
    return {**BASE, **other}


def _llava() -> Any:
    return LlavaConfig(
        text_config=LlamaConfig(**_text(**HEAD)), vision_config=CLIPVisionConfig(**VISION), image_token_index=500
    )


def _gemma3() -> Any:
    text = Gemma3TextConfig(**_text(**HEAD, **TIED) | {"sliding_window": 32, "query_pre_attn_scalar": 32})
    tokens = {"image_token_index": 500, "boi_token_index": 501, "eoi_token_index": 502, "mm_tokens_per_image": 4}
    return Gemma3Config(text_config=text, vision_config=SiglipVisionConfig(**VISION), **tokens)


def _gemma4() -> Any:
    vision = {**VISION, "num_key_value_heads": 2, "head_dim": 16}
    tokens = {f"{kind}_token_id": 500 + number for number, kind in enumerate(("image", "boi", "eoi", "audio", "video"))}
    text = Gemma4TextConfig(**{**BASE, **GEMMA4})
    return Gemma4Config(text_config=text, vision_config=vision, audio_config=None, **tokens)


def _mistral3() -> Any:
    text = MistralConfig(**_text(**HEAD, sliding_window=None))
    return Mistral3Config(text_config=text, vision_config=PixtralVisionConfig(**VISION), image_token_index=500)


def _qwen2_vl() -> Any:
    vision = {**QWEN_VISION, "embed_dim": 32, "hidden_size": WIDTH}
    return Qwen2VLConfig(text_config=_text(rope_scaling=ROTARY), vision_config=vision, **QWEN_TOKENS)


def _qwen2_5_vl() -> Any:
    vision = {**QWEN_VISION, "hidden_size": 32, "out_hidden_size": WIDTH, "intermediate_size": 48}
    return Qwen2_5_VLConfig(text_config=_text(rope_scaling=ROTARY), vision_config=vision, **QWEN_TOKENS)


def _qwen3_vl() -> Any:
    vision = {**QWEN_VISION, "hidden_size": 32, "out_hidden_size": WIDTH, "intermediate_size": 48}
    text = _text(**HEAD, rope_scaling={**ROTARY, "mrope_interleaved": True})
    return Qwen3VLConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]}, **QWEN_TOKENS)


_MODELS = "vllm.model_executor.models."

MULTIMODAL: dict[str, Multimodal] = {
    "Gemma3ForConditionalGeneration": Multimodal(
        config=_gemma3, layer_class=_MODELS + "gemma3.Gemma3DecoderLayer", norm_weight=0.0
    ),
    "Gemma4ForConditionalGeneration": Multimodal(
        config=_gemma4, layer_class=_MODELS + "gemma4.Gemma4DecoderLayer", norm_weight=0.4
    ),
    "LlavaForConditionalGeneration": Multimodal(config=_llava, layer_class=_MODELS + "llama.LlamaDecoderLayer"),
    "Mistral3ForConditionalGeneration": Multimodal(
        config=_mistral3, layer_class=_MODELS + "mistral.MistralDecoderLayer"
    ),
    "Qwen2VLForConditionalGeneration": Multimodal(config=_qwen2_vl, layer_class=_MODELS + "qwen2.Qwen2DecoderLayer"),
    "Qwen2_5_VLForConditionalGeneration": Multimodal(
        config=_qwen2_5_vl, layer_class=_MODELS + "qwen2.Qwen2DecoderLayer"
    ),
    "Qwen3VLForConditionalGeneration": Multimodal(
        config=_qwen3_vl, layer_class=_MODELS + "qwen3_vl.Qwen3VLDecoderLayer"
    ),
}
"""Architecture, as config.json has it -> its model."""


def write_multimodal(architecture: str, folder: Path) -> None:
    """Writes the model of one architecture, with random weights, as transformers would."""
    torch.manual_seed(0)
    kind = MULTIMODAL[architecture]
    model = AutoModelForImageTextToText.from_config(kind.config(), dtype=torch.float32)
    draw_weights(model, kind.norm_weight)
    model.save_pretrained(folder)
