"""What the decoder layers of each family return, where the layers live, and where the norm behind them is.

The table lists classes that tests/engine/test_families.py has compared with HuggingFace, reading and writing the
stream. A class is known by its module too: transformers has classes of the same names that return something else, and
a subclass may do what its parent does not. docs/models.md says what was tried and how far it got.

Relies on (vLLM 0.32): what the `forward` of each class returns, and what the next layer takes of it.
`engine.worker.self_test` proves it again on the loaded model, whatever the version.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import torch

from steer_service.core.errors import Unsupported
from steer_service.core.layer_paths import VLLM_LAYER_PATHS, attributes_at


class LayerOutput(StrEnum):
    """Where the residual stream is in what a decoder layer returns."""

    HIDDEN_AND_RESIDUAL = "hidden_and_residual"
    """`(hidden, residual)`: the stream is their sum, which the next norm takes."""
    ONE_TENSOR = "one_tensor"
    """A tensor: the stream."""
    FIRST_OF_TWO = "first_of_two"
    """`(hidden, something)`: hidden is the stream, and nobody reads the other."""

    def stream_in(self, output: Any) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """The tensors whose sum is the stream; None if `output` is not of this form."""
        if self is LayerOutput.ONE_TENSOR:
            return (output, None) if isinstance(output, torch.Tensor) else None
        if not isinstance(output, tuple) or len(output) < 2 or not isinstance(output[0], torch.Tensor):
            return None
        if self is LayerOutput.FIRST_OF_TWO:
            return output[0], None
        return (output[0], output[1]) if isinstance(output[1], torch.Tensor) else None

    def with_stream(self, output: Any, hidden: torch.Tensor, residual: torch.Tensor | None) -> Any:
        """`output` with the tensors that `stream_in` returned, or contiguous copies of them, in their places."""
        match self:
            case LayerOutput.ONE_TENSOR:
                return hidden
            case LayerOutput.FIRST_OF_TWO:
                return (hidden, *output[1:])
            case LayerOutput.HIDDEN_AND_RESIDUAL:
                return (hidden, residual, *output[2:])


_VLLM = "vllm.model_executor.models."
_TRANSFORMERS = "transformers.models."

_VERIFIED: dict[LayerOutput, tuple[str, ...]] = {
    LayerOutput.HIDDEN_AND_RESIDUAL: (
        _VLLM + "afmoe.AfmoeDecoderLayer",
        _VLLM + "apertus.ApertusDecoderLayer",
        _VLLM + "ernie45_moe.Ernie4_5_MoeDecoderLayer",
        _VLLM + "exaone_moe.ExaoneMoeDecoderLayer",
        _VLLM + "gemma.GemmaDecoderLayer",
        _VLLM + "gemma2.Gemma2DecoderLayer",
        _VLLM + "gemma3.Gemma3DecoderLayer",
        _VLLM + "glm4.Glm4DecoderLayer",
        _VLLM + "glm4_moe.Glm4MoeDecoderLayer",
        _VLLM + "gpt_oss.TransformerBlock",
        _VLLM + "llama.LlamaDecoderLayer",
        _VLLM + "llama4.Llama4DecoderLayer",
        _VLLM + "mistral.MistralDecoderLayer",
        _VLLM + "mixtral.MixtralDecoderLayer",
        _VLLM + "nemotron.NemotronDecoderLayer",
        _VLLM + "olmoe.OlmoeDecoderLayer",
        _VLLM + "qwen2.Qwen2DecoderLayer",
        _VLLM + "qwen2_moe.Qwen2MoeDecoderLayer",
        _VLLM + "qwen3.Qwen3DecoderLayer",
        _VLLM + "qwen3_moe.Qwen3MoeDecoderLayer",
    ),
    LayerOutput.ONE_TENSOR: (
        _VLLM + "bloom.BloomBlock",
        _VLLM + "falcon.FalconDecoderLayer",
        _VLLM + "gpt2.GPT2Block",
        _VLLM + "gpt_j.GPTJBlock",
        _VLLM + "granite.GraniteDecoderLayer",
        _VLLM + "granitemoe.GraniteMoeDecoderLayer",
        _VLLM + "granitemoeshared.GraniteMoeSharedDecoderLayer",
        _VLLM + "opt.OPTDecoderLayer",
        # vLLM's transformers backend runs these layers of transformers.
        _TRANSFORMERS + "arcee.modeling_arcee.ArceeDecoderLayer",
        _TRANSFORMERS + "cwm.modeling_cwm.CwmDecoderLayer",
        _TRANSFORMERS + "flex_olmo.modeling_flex_olmo.FlexOlmoDecoderLayer",
        _TRANSFORMERS + "glm.modeling_glm.GlmDecoderLayer",
        _TRANSFORMERS + "gpt_bigcode.modeling_gpt_bigcode.GPTBigCodeBlock",
        _TRANSFORMERS + "gpt_neox.modeling_gpt_neox.GPTNeoXLayer",
        _TRANSFORMERS + "helium.modeling_helium.HeliumDecoderLayer",
        _TRANSFORMERS + "hunyuan_v1_dense.modeling_hunyuan_v1_dense.HunYuanDenseV1DecoderLayer",
        _TRANSFORMERS + "jais2.modeling_jais2.Jais2DecoderLayer",
        _TRANSFORMERS + "ministral.modeling_ministral.MinistralDecoderLayer",
        _TRANSFORMERS + "olmo.modeling_olmo.OlmoDecoderLayer",
        _TRANSFORMERS + "olmo2.modeling_olmo2.Olmo2DecoderLayer",
        _TRANSFORMERS + "olmo3.modeling_olmo3.Olmo3DecoderLayer",
        _TRANSFORMERS + "phi.modeling_phi.PhiDecoderLayer",
        _TRANSFORMERS + "seed_oss.modeling_seed_oss.SeedOssDecoderLayer",
        _TRANSFORMERS + "smollm3.modeling_smollm3.SmolLM3DecoderLayer",
        _TRANSFORMERS + "starcoder2.modeling_starcoder2.Starcoder2DecoderLayer",
        _TRANSFORMERS + "vaultgemma.modeling_vaultgemma.VaultGemmaDecoderLayer",
    ),
    LayerOutput.FIRST_OF_TWO: (
        _VLLM + "cohere2_moe.Cohere2MoeDecoderLayer",
        _VLLM + "commandr.CohereDecoderLayer",
        _VLLM + "exaone4.Exaone4DecoderLayer",
        _VLLM + "granitemoehybrid.GraniteMoeHybridAttentionDecoderLayer",
        _VLLM + "hyperclovax.HyperCLOVAXDecoderLayer",
        _VLLM + "minicpm3.MiniCPM3DecoderLayer",
        _VLLM + "stablelm.StablelmDecoderLayer",
    ),
}

LAYER_OUTPUTS: dict[str, LayerOutput] = {
    name: layer_output for layer_output, names in _VERIFIED.items() for name in names
}
"""Module and name of a layer's class -> what it returns; exactly this class, not those made from it."""

WELL_KNOWN = "Llama, Mistral, Mixtral, Qwen 2 and 3, Gemma 1 to 3, Phi, OLMo, Cohere, GLM-4, gpt-oss and GPT-2"
"""Families in the table, for messages."""

FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f")
"""What the norm behind the last layer is called, beside the list of layers."""


def decoder_layers(model: torch.nn.Module) -> Sequence[torch.nn.Module]:
    """The decoder layers, those of other pipeline stages (PPMissingLayer) included.

    Raises Unsupported for a model that keeps them at none of VLLM_LAYER_PATHS.
    """
    return list(model.get_submodule(_layer_list(model)).children())


def final_norm(model: torch.nn.Module) -> torch.nn.Module | None:
    """The norm between the last layer and the model's output; None where it has none or is not found."""
    beside = model.get_submodule(_layer_list(model).rpartition(".")[0])
    norms = (getattr(beside, name, None) for name in FINAL_NORMS)
    return next((norm for norm in norms if norm is not None), None)


def layer_output_of(layer: torch.nn.Module, unverified: str) -> LayerOutput:
    """What `layer` returns: by LAYER_OUTPUTS, or for a class that is not there what the user says (`unverified`).

    Raises Unsupported for a class that is not in LAYER_OUTPUTS if the user said nothing.
    """
    kind = type(layer)
    known = LAYER_OUTPUTS.get(f"{kind.__module__}.{kind.__qualname__}")
    if known is not None:
        return known
    if unverified:
        return LayerOutput(unverified)
    raise Unsupported(
        f"what {kind.__qualname__} returns has not been compared with HuggingFace; {len(LAYER_OUTPUTS)} "
        f"classes have, among them those of {WELL_KNOWN} (docs/models.md has all). If you know it, say it with "
        f"steer_allow_unverified (--steer-allow-unverified {'|'.join(LayerOutput)}): it is tested before it serves",
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
