"""One tiny random model of every decoder family that vLLM runs on a CPU, made from its config.

Width 64, four layers, head_dim 32 (the smallest that vLLM's CPU attention takes), float32. All weights are drawn here,
norms and biases too, so that none of them can be left out unnoticed.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

LAYERS = 4
WIDTH = 64
VOCABULARY = 512

BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
"""What most configs call the same."""

HEAD = {"head_dim": 32}

TIED = {"tie_word_embeddings": True}

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

GPT = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": 256}
"""The names of GPT-2 and its heirs."""


@dataclass(frozen=True, slots=True)
class Family:
    """How to make its model."""

    config: Mapping[str, Any] = field(default_factory=dict)
    """Fields of its config beside BASE; None leaves one of BASE out."""
    model_type: str = ""
    """transformers' name, if it is not the family's."""
    architecture: str = ""
    """vLLM's name of the model's class, where transformers writes another."""
    norm_weight: float = 1.0
    """Mean of the norms' weights; 0 where one is added to them."""
    mend: Callable[[Any], None] | None = None
    """What must change in transformers' model before it does what vLLM's does."""


def _exact_gelu(model: Any) -> None:
    """Bloom's GELU is an approximation in transformers and exact in vLLM: 3e-4 apart."""
    for block in model.transformer.h:
        block.mlp.gelu_impl = torch.nn.GELU()


WITHOUT_HEADS = {"num_key_value_heads": None}

FAMILIES: dict[str, Family] = {
    # The nine that must be served.
    "qwen2": Family(),
    "qwen3": Family(HEAD),
    "qwen3_moe": Family({**HEAD, **EXPERTS, "decoder_sparse_step": 1, "norm_topk_prob": True}),
    "llama": Family(HEAD),
    "mistral": Family({**HEAD, "sliding_window": 32}),
    "gemma2": Family({**HEAD, **TIED, "sliding_window": 32, "query_pre_attn_scalar": 32}, norm_weight=0.0),
    "gemma3": Family(
        {**HEAD, **TIED, "sliding_window": 32, "query_pre_attn_scalar": 32}, model_type="gemma3_text", norm_weight=0.0
    ),
    "phi3": Family({"original_max_position_embeddings": 256}),
    "gpt2": Family(GPT),
    # Others.
    "qwen2_moe": Family({**EXPERTS, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 1}),
    "mixtral": Family({**HEAD, **LOCAL_EXPERTS}),
    "olmoe": Family({**EXPERTS, "intermediate_size": 48}),
    "gemma": Family({**HEAD, **TIED}, norm_weight=0.0),
    "granite": Family({"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2}),
    "granitemoe": Family({**LOCAL_EXPERTS, "residual_multiplier": 0.7, "attention_multiplier": 0.2}),
    "granitemoeshared": Family({**LOCAL_EXPERTS, "residual_multiplier": 0.7, "shared_intermediate_size": 48}),
    "cohere": Family({**TIED, "use_qk_norm": True}),
    "cohere2": Family({**TIED, "sliding_window": 256}),
    "stablelm": Family({"partial_rotary_factor": 0.25}),
    "gptj": Family({**GPT, "rotary_dim": 16}),
    "opt": Family({"ffn_dim": 96, "word_embed_proj_dim": WIDTH, **WITHOUT_HEADS}),
    "bloom": Family({**TIED, "n_layer": LAYERS, "n_head": 2}, mend=_exact_gelu),
    "falcon": Family({"new_decoder_architecture": True, "num_kv_heads": 1}),
    "falcon_7b": Family({"new_decoder_architecture": False, "multi_query": True}, model_type="falcon"),
    "falcon_rw": Family(
        {"new_decoder_architecture": False, "multi_query": False, "parallel_attn": False, "bias": True},
        model_type="falcon",
    ),
    "phimoe": Family(LOCAL_EXPERTS, architecture="PhiMoEForCausalLM"),
    "exaone4": Family({**HEAD, "sliding_window": 32, "sliding_window_pattern": 4}),
    "exaone_moe": Family({**HEAD, **EXPERTS, "sliding_window": 32, "num_shared_experts": 1, "n_group": 1}),
    "glm4": Family(HEAD),
    "glm4_moe": Family(
        {**HEAD, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_shared_experts": 1}
    ),
    "nemotron": Family(HEAD),
    "ernie4_5": Family(HEAD),
    "ernie4_5_moe": Family({**HEAD, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 48}),
    "apertus": Family(),
    "gpt_oss": Family({**HEAD, **LOCAL_EXPERTS, "sliding_window": 32}),
    "minimax_m2": Family({**HEAD, **LOCAL_EXPERTS, "rotary_dim": 32, "scoring_func": "sigmoid"}),
    "llama4": Family(
        {**HEAD, **LOCAL_EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 96, "attention_chunk_size": 128},
        model_type="llama4_text",
    ),
    "deepseek_v2": Family(
        {
            "n_group": 1,
            "topk_group": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "first_k_dense_replace": 1,
            "q_lora_rank": 32,
            "num_key_value_heads": 2,
        }
    ),
    "deepseek_v3": Family(
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "first_k_dense_replace": 1,
            "q_lora_rank": 32,
            "n_group": 2,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "num_key_value_heads": 2,
        }
    ),
    "afmoe": Family(
        {
            **HEAD,
            **EXPERTS,
            "sliding_window": 32,
            "num_dense_layers": 1,
            "score_func": "sigmoid",
            "route_norm": True,
            "route_scale": 1.0,
            "n_group": 1,
            "topk_group": 1,
        }
    ),
    "hunyuan_v1_dense": Family(HEAD),
    "hyperclovax": Family(HEAD),
    "hy_v3": Family({**HEAD, **EXPERTS, "first_k_dense_replace": 1, "expert_hidden_dim": 48}),
    "dbrx": Family(
        {
            "d_model": WIDTH,
            "n_heads": 2,
            "n_layers": LAYERS,
            "max_seq_len": 256,
            "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 1},
        }
    ),
    "ministral3": Family(HEAD),
    "ministral": Family(HEAD),
    "lfm2": Family(),
    "cohere2_moe": Family({**HEAD, **LOCAL_EXPERTS, **EXPERTS, **TIED, "sliding_window": 256}),
    "granitemoehybrid": Family(
        {
            **LOCAL_EXPERTS,
            "layer_types": ["attention"] * LAYERS,
            "shared_intermediate_size": 48,
            "position_embedding_type": "rope",
        }
    ),
    "minicpm3": Family(
        {
            "num_key_value_heads": 2,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 32,
        }
    ),
    "flex_olmo": Family({**EXPERTS, "intermediate_size": 48}),
    "glm4_moe_lite": Family(
        {
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "n_shared_experts": 1,
            "q_lora_rank": 32,
            "num_key_value_heads": 2,
        }
    ),
    # On vLLM's transformers backend.
    "olmo": Family(),
    "olmo2": Family(),
    "olmo3": Family({"sliding_window": 32}),
    "starcoder2": Family(),
    "gpt_neox": Family(WITHOUT_HEADS),
    "gpt_bigcode": Family(GPT),
    "phi": Family(),
    "seed_oss": Family(HEAD),
    "smollm3": Family(HEAD),
    "arcee": Family(HEAD),
    "glm": Family(HEAD),
    "persimmon": Family(WITHOUT_HEADS),
    "mpt": Family({"d_model": WIDTH, "n_heads": 2, "n_layers": LAYERS, "max_seq_len": 256}),
    "helium": Family(HEAD),
    "jais2": Family(HEAD),
    "bitnet": Family(),
    "dots1": Family(
        {
            **HEAD,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        }
    ),
    "mellum": Family(HEAD),
    "nanochat": Family(),
    "solar_open": Family(
        {
            **HEAD,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
        }
    ),
    "vaultgemma": Family({**HEAD, **TIED, "sliding_window": 32, "query_pre_attn_scalar": 32}, norm_weight=0.0),
    "cwm": Family(HEAD),
}
"""Name -> its model."""

LAYER_CLASSES: dict[str, str] = {
    "qwen2": "vllm.model_executor.models.qwen2.Qwen2DecoderLayer",
    "qwen3": "vllm.model_executor.models.qwen3.Qwen3DecoderLayer",
    "qwen3_moe": "vllm.model_executor.models.qwen3_moe.Qwen3MoeDecoderLayer",
    "llama": "vllm.model_executor.models.llama.LlamaDecoderLayer",
    "mistral": "vllm.model_executor.models.mistral.MistralDecoderLayer",
    "gemma2": "vllm.model_executor.models.gemma2.Gemma2DecoderLayer",
    "gemma3": "vllm.model_executor.models.gemma3.Gemma3DecoderLayer",
    "phi3": "vllm.model_executor.models.llama.LlamaDecoderLayer",
    "gpt2": "vllm.model_executor.models.gpt2.GPT2Block",
    "qwen2_moe": "vllm.model_executor.models.qwen2_moe.Qwen2MoeDecoderLayer",
    "mixtral": "vllm.model_executor.models.mixtral.MixtralDecoderLayer",
    "olmoe": "vllm.model_executor.models.olmoe.OlmoeDecoderLayer",
    "gemma": "vllm.model_executor.models.gemma.GemmaDecoderLayer",
    "granite": "vllm.model_executor.models.granite.GraniteDecoderLayer",
    "granitemoe": "vllm.model_executor.models.granitemoe.GraniteMoeDecoderLayer",
    "granitemoeshared": "vllm.model_executor.models.granitemoeshared.GraniteMoeSharedDecoderLayer",
    "granitemoehybrid": "vllm.model_executor.models.granitemoehybrid.GraniteMoeHybridAttentionDecoderLayer",
    "cohere": "vllm.model_executor.models.commandr.CohereDecoderLayer",
    "cohere2": "vllm.model_executor.models.commandr.CohereDecoderLayer",
    "cohere2_moe": "vllm.model_executor.models.cohere2_moe.Cohere2MoeDecoderLayer",
    "stablelm": "vllm.model_executor.models.stablelm.StablelmDecoderLayer",
    "gptj": "vllm.model_executor.models.gpt_j.GPTJBlock",
    "opt": "vllm.model_executor.models.opt.OPTDecoderLayer",
    "bloom": "vllm.model_executor.models.bloom.BloomBlock",
    "falcon": "vllm.model_executor.models.falcon.FalconDecoderLayer",
    "falcon_7b": "vllm.model_executor.models.falcon.FalconDecoderLayer",
    "falcon_rw": "vllm.model_executor.models.falcon.FalconDecoderLayer",
    "exaone4": "vllm.model_executor.models.exaone4.Exaone4DecoderLayer",
    "exaone_moe": "vllm.model_executor.models.exaone_moe.ExaoneMoeDecoderLayer",
    "glm4": "vllm.model_executor.models.glm4.Glm4DecoderLayer",
    "glm4_moe": "vllm.model_executor.models.glm4_moe.Glm4MoeDecoderLayer",
    "nemotron": "vllm.model_executor.models.nemotron.NemotronDecoderLayer",
    "ernie4_5": "vllm.model_executor.models.llama.LlamaDecoderLayer",
    "ernie4_5_moe": "vllm.model_executor.models.ernie45_moe.Ernie4_5_MoeDecoderLayer",
    "apertus": "vllm.model_executor.models.apertus.ApertusDecoderLayer",
    "gpt_oss": "vllm.model_executor.models.gpt_oss.TransformerBlock",
    "llama4": "vllm.model_executor.models.llama4.Llama4DecoderLayer",
    "afmoe": "vllm.model_executor.models.afmoe.AfmoeDecoderLayer",
    "hyperclovax": "vllm.model_executor.models.hyperclovax.HyperCLOVAXDecoderLayer",
    "ministral3": "vllm.model_executor.models.mistral.MistralDecoderLayer",
    "minicpm3": "vllm.model_executor.models.minicpm3.MiniCPM3DecoderLayer",
    "flex_olmo": "transformers.models.flex_olmo.modeling_flex_olmo.FlexOlmoDecoderLayer",
    "olmo": "transformers.models.olmo.modeling_olmo.OlmoDecoderLayer",
    "olmo2": "transformers.models.olmo2.modeling_olmo2.Olmo2DecoderLayer",
    "olmo3": "transformers.models.olmo3.modeling_olmo3.Olmo3DecoderLayer",
    "starcoder2": "transformers.models.starcoder2.modeling_starcoder2.Starcoder2DecoderLayer",
    "gpt_neox": "transformers.models.gpt_neox.modeling_gpt_neox.GPTNeoXLayer",
    "gpt_bigcode": "transformers.models.gpt_bigcode.modeling_gpt_bigcode.GPTBigCodeBlock",
    "phi": "transformers.models.phi.modeling_phi.PhiDecoderLayer",
    "seed_oss": "transformers.models.seed_oss.modeling_seed_oss.SeedOssDecoderLayer",
    "smollm3": "transformers.models.smollm3.modeling_smollm3.SmolLM3DecoderLayer",
    "arcee": "transformers.models.arcee.modeling_arcee.ArceeDecoderLayer",
    "glm": "transformers.models.glm.modeling_glm.GlmDecoderLayer",
    "helium": "transformers.models.helium.modeling_helium.HeliumDecoderLayer",
    "jais2": "transformers.models.jais2.modeling_jais2.Jais2DecoderLayer",
    "bitnet": "transformers.models.bitnet.modeling_bitnet.BitNetDecoderLayer",
    "dots1": "transformers.models.dots1.modeling_dots1.Dots1DecoderLayer",
    "mellum": "transformers.models.mellum.modeling_mellum.MellumDecoderLayer",
    "nanochat": "transformers.models.nanochat.modeling_nanochat.NanoChatDecoderLayer",
    "solar_open": "transformers.models.solar_open.modeling_solar_open.SolarOpenDecoderLayer",
    "vaultgemma": "transformers.models.vaultgemma.modeling_vaultgemma.VaultGemmaDecoderLayer",
    "cwm": "transformers.models.cwm.modeling_cwm.CwmDecoderLayer",
    "hunyuan_v1_dense": "transformers.models.hunyuan_v1_dense.modeling_hunyuan_v1_dense.HunYuanDenseV1DecoderLayer",
    "ministral": "transformers.models.ministral.modeling_ministral.MinistralDecoderLayer",
}
"""Family that is proven -> the class of its layers; the others, and why they are not, are in docs/models.md."""

EVERY_TIME = frozenset(
    (
        "cohere",
        "gemma2",
        "gemma3",
        "gpt2",
        "llama",
        "mistral",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
    )
)
"""Families that the usual test run proves: those that must be served, and one of each kind of layer output."""


def config_of(family: Family, name: str = "") -> Any:
    """transformers' config of one family; `name` is its model type unless it has one of its own."""
    fields = {key: value for key, value in {**BASE, **family.config}.items() if value is not None}
    return AutoConfig.for_model(family.model_type or name, **fields)


def architecture_of(family: Family, name: str = "") -> str:
    """The name of the model's class in the config.json of one family."""
    kind = AutoModelForCausalLM._model_mapping[type(config_of(family, name))]
    return family.architecture or str(kind.__name__)


def make_family(name: str, folder: Path) -> None:
    """Writes the model of one of FAMILIES."""
    write_family(FAMILIES[name], folder, name)


def write_family(family: Family, folder: Path, name: str = "") -> None:
    """Writes the model of one family, with random weights, as transformers would."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, name), dtype=torch.float32)
    draw_weights(model, family.norm_weight)
    model.save_pretrained(folder)
    if family.architecture:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": [family.architecture]}))


def draw_weights(model: torch.nn.Module, norm_weight: float) -> None:
    """Draws all weights: those of norms around `norm_weight`, all others around 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "e_score_correction_bias" in name:
                continue  # beside softmax, vLLM's experts on a CPU do without it
            is_scale = parameter.dim() == 1 and name.endswith("weight")
            parameter.normal_(norm_weight if is_scale else 0.0, 0.1)
            if "act_fn.alpha" in name:
                parameter.fill_(24.0)  # vLLM takes softplus of it in bfloat16: exact above 20
