"""The outputs of the decoder layers of each model family, and the places of these layers and of the final norm.

The table lists the classes that tests/engine/test_families.py has compared with transformers: it reads and writes their
residual stream. Classes are listed with their module: transformers has classes of the same names with other outputs,
and a subclass may differ from its parent. docs/models.md lists every model that was tried, with the result.

Relies on (vLLM 0.32): what the `forward` of each class returns, and what the next layer reads of it. In every version,
`engine.worker.self_test` checks this again on the loaded model.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import torch

from steer_service.core.errors import Unsupported
from steer_service.core.layer_paths import VLLM_LAYER_PATHS, attributes_at


class LayerOutput(StrEnum):
    """The form of a decoder layer's output, and the place of the residual stream in it."""

    HIDDEN_AND_RESIDUAL = "hidden_and_residual"
    """`(hidden, residual)`: the residual stream is their sum, which the next norm computes."""
    ONE_TENSOR = "one_tensor"
    """A tensor: the residual stream."""
    FIRST_OF_TWO = "first_of_two"
    """`(hidden, other)`: the residual stream is `hidden`; `other` is not read."""

    def stream_in(self, output: Any) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """The tensors whose sum is the residual stream; None if `output` does not have this form."""
        if self is LayerOutput.ONE_TENSOR:
            return (output, None) if isinstance(output, torch.Tensor) else None
        if not isinstance(output, tuple) or len(output) < 2 or not isinstance(output[0], torch.Tensor):
            return None
        if self is LayerOutput.FIRST_OF_TWO:
            return output[0], None
        return (output[0], output[1]) if isinstance(output[1], torch.Tensor) else None

    def with_stream(self, output: Any, hidden: torch.Tensor, residual: torch.Tensor | None) -> Any:
        """`output` with these tensors in the places from which `stream_in` read them."""
        match self:
            case LayerOutput.ONE_TENSOR:
                return hidden
            case LayerOutput.FIRST_OF_TWO:
                return (hidden, *output[1:])
            case LayerOutput.HIDDEN_AND_RESIDUAL:
                return (hidden, residual, *output[2:])


VLLM = "vllm.model_executor.models."
"""Module above those of vLLM's models."""
_TRANSFORMERS = "transformers.models."

_VERIFIED: dict[LayerOutput, tuple[str, ...]] = {
    LayerOutput.HIDDEN_AND_RESIDUAL: (
        VLLM + "afmoe.AfmoeDecoderLayer",
        VLLM + "apertus.ApertusDecoderLayer",
        VLLM + "ernie45_moe.Ernie4_5_MoeDecoderLayer",
        VLLM + "exaone_moe.ExaoneMoeDecoderLayer",
        VLLM + "gemma.GemmaDecoderLayer",
        VLLM + "gemma2.Gemma2DecoderLayer",
        VLLM + "gemma3.Gemma3DecoderLayer",
        VLLM + "glm4.Glm4DecoderLayer",
        VLLM + "glm4_moe.Glm4MoeDecoderLayer",
        VLLM + "gpt_oss.TransformerBlock",
        VLLM + "llama.LlamaDecoderLayer",
        VLLM + "llama4.Llama4DecoderLayer",
        VLLM + "mistral.MistralDecoderLayer",
        VLLM + "mixtral.MixtralDecoderLayer",
        VLLM + "nemotron.NemotronDecoderLayer",
        VLLM + "olmoe.OlmoeDecoderLayer",
        VLLM + "qwen2.Qwen2DecoderLayer",
        VLLM + "qwen2_moe.Qwen2MoeDecoderLayer",
        VLLM + "qwen3.Qwen3DecoderLayer",
        VLLM + "qwen3_moe.Qwen3MoeDecoderLayer",
        VLLM + "qwen3_vl.Qwen3VLDecoderLayer",
    ),
    LayerOutput.ONE_TENSOR: (
        VLLM + "bloom.BloomBlock",
        VLLM + "falcon.FalconDecoderLayer",
        VLLM + "gpt2.GPT2Block",
        VLLM + "gpt_j.GPTJBlock",
        VLLM + "granite.GraniteDecoderLayer",
        VLLM + "granitemoe.GraniteMoeDecoderLayer",
        VLLM + "granitemoeshared.GraniteMoeSharedDecoderLayer",
        VLLM + "opt.OPTDecoderLayer",
        # vLLM's transformers backend runs these layers of transformers.
        _TRANSFORMERS + "arcee.modeling_arcee.ArceeDecoderLayer",
        _TRANSFORMERS + "bitnet.modeling_bitnet.BitNetDecoderLayer",
        _TRANSFORMERS + "cwm.modeling_cwm.CwmDecoderLayer",
        _TRANSFORMERS + "dots1.modeling_dots1.Dots1DecoderLayer",
        _TRANSFORMERS + "flex_olmo.modeling_flex_olmo.FlexOlmoDecoderLayer",
        _TRANSFORMERS + "glm.modeling_glm.GlmDecoderLayer",
        _TRANSFORMERS + "gpt_bigcode.modeling_gpt_bigcode.GPTBigCodeBlock",
        _TRANSFORMERS + "gpt_neox.modeling_gpt_neox.GPTNeoXLayer",
        _TRANSFORMERS + "helium.modeling_helium.HeliumDecoderLayer",
        _TRANSFORMERS + "hunyuan_v1_dense.modeling_hunyuan_v1_dense.HunYuanDenseV1DecoderLayer",
        _TRANSFORMERS + "jais2.modeling_jais2.Jais2DecoderLayer",
        _TRANSFORMERS + "mellum.modeling_mellum.MellumDecoderLayer",
        _TRANSFORMERS + "ministral.modeling_ministral.MinistralDecoderLayer",
        _TRANSFORMERS + "nanochat.modeling_nanochat.NanoChatDecoderLayer",
        _TRANSFORMERS + "olmo.modeling_olmo.OlmoDecoderLayer",
        _TRANSFORMERS + "olmo2.modeling_olmo2.Olmo2DecoderLayer",
        _TRANSFORMERS + "olmo3.modeling_olmo3.Olmo3DecoderLayer",
        _TRANSFORMERS + "phi.modeling_phi.PhiDecoderLayer",
        _TRANSFORMERS + "seed_oss.modeling_seed_oss.SeedOssDecoderLayer",
        _TRANSFORMERS + "smollm3.modeling_smollm3.SmolLM3DecoderLayer",
        _TRANSFORMERS + "solar_open.modeling_solar_open.SolarOpenDecoderLayer",
        _TRANSFORMERS + "starcoder2.modeling_starcoder2.Starcoder2DecoderLayer",
        _TRANSFORMERS + "vaultgemma.modeling_vaultgemma.VaultGemmaDecoderLayer",
    ),
    LayerOutput.FIRST_OF_TWO: (
        VLLM + "cohere2_moe.Cohere2MoeDecoderLayer",
        VLLM + "commandr.CohereDecoderLayer",
        VLLM + "exaone4.Exaone4DecoderLayer",
        VLLM + "gemma4.Gemma4DecoderLayer",
        VLLM + "granitemoehybrid.GraniteMoeHybridAttentionDecoderLayer",
        VLLM + "hyperclovax.HyperCLOVAXDecoderLayer",
        VLLM + "minicpm3.MiniCPM3DecoderLayer",
        VLLM + "stablelm.StablelmDecoderLayer",
    ),
}

LAYER_OUTPUTS: dict[str, LayerOutput] = {
    name: layer_output for layer_output, names in _VERIFIED.items() for name in names
}
"""Module and name of a layer's class -> its output. Subclasses do not count."""

WELL_KNOWN = "Llama, Mistral, Mixtral, Qwen 2 and 3, Gemma 1 to 4, Phi, OLMo, Cohere, GLM-4, gpt-oss and GPT-2"
"""Families in the table, for messages."""

FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f")
"""Names of the norm after the last layer, an attribute beside the list of layers."""


def decoder_layers(model: torch.nn.Module) -> Sequence[torch.nn.Module]:
    """The decoder layers, with those of other pipeline stages (PPMissingLayer).

    Raises Unsupported for a model that keeps them at none of VLLM_LAYER_PATHS.
    """
    return list(model.get_submodule(_layer_list(model)).children())


def final_norm(model: torch.nn.Module) -> torch.nn.Module | None:
    """The norm between the last layer and the model's output; None if none is found."""
    beside = model.get_submodule(_layer_list(model).rpartition(".")[0])
    norms = (getattr(beside, name, None) for name in FINAL_NORMS)
    return next((norm for norm in norms if norm is not None), None)


def layer_output_of(layer: torch.nn.Module, unverified: str) -> LayerOutput:
    """The output of `layer`: that in LAYER_OUTPUTS or, for a class that is not listed, `unverified`.

    `unverified` is the user's setting `steer_allow_unverified`, "" if it is not set: Unsupported is raised then.
    """
    kind = type(layer)
    known = LAYER_OUTPUTS.get(f"{kind.__module__}.{kind.__qualname__}")
    if known is not None:
        return known
    if unverified:
        return LayerOutput(unverified)
    raise Unsupported(
        f"the output of {kind.__qualname__} has not been compared with transformers. {len(LAYER_OUTPUTS)} classes "
        f"have, such as those of {WELL_KNOWN}; docs/models.md lists all. If you know the output, set "
        f"steer_allow_unverified (--steer-allow-unverified {'|'.join(LayerOutput)}); it is tested before serving",
        reason="UNVERIFIED_ARCHITECTURE",
    )


def _layer_list(model: torch.nn.Module) -> str:
    for path, found in attributes_at(model, VLLM_LAYER_PATHS):
        if isinstance(found, torch.nn.Module):
            return path
    raise Unsupported(
        f"{type(model).__name__} keeps its decoder layers in none of {', '.join(VLLM_LAYER_PATHS)}",
        reason="UNKNOWN_ARCHITECTURE",
    )
