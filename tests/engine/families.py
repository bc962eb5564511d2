"""One tiny random model of every decoder family that vLLM runs on a CPU, made from its config.

Width 64, four layers, head_dim 32 (the smallest that vLLM's CPU attention takes), float32. All weights are drawn here,
norms and biases too, so that none of them can be left out unnoticed.
"""

from collections.abc import Mapping
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
    tolerance: float = 1e-5
    """Largest relative error of a row against the oracle."""


WITHOUT_HEADS = {"num_key_value_heads": None}

FAMILIES: dict[str, Family] = {
    # The nine that must be served.
    "qwen2": Family(),
    "qwen3": Family(HEAD),
    "qwen3_moe": Family({**HEAD, **EXPERTS, "decoder_sparse_step": 1, "norm_topk_prob": True}),
    "llama": Family(HEAD),
    "mistral": Family({**HEAD, "sliding_window": 32}),
    "gemma2": Family({**HEAD, **TIED, "sliding_window": 32, "query_pre_attn_scalar": 32}),
    "gemma3": Family({**HEAD, **TIED, "sliding_window": 32, "query_pre_attn_scalar": 32}, model_type="gemma3_text"),
    "phi3": Family({"original_max_position_embeddings": 256}),
    "gpt2": Family(GPT),
    # Others.
    "qwen2_moe": Family({**EXPERTS, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 1}),
    "mixtral": Family({**HEAD, **LOCAL_EXPERTS}),
    "olmoe": Family({**EXPERTS, "intermediate_size": 48}),
    "gemma": Family({**HEAD, **TIED}),
    "granite": Family({"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2}),
    "granitemoe": Family({**LOCAL_EXPERTS, "residual_multiplier": 0.7, "attention_multiplier": 0.2}),
    "granitemoeshared": Family({**LOCAL_EXPERTS, "residual_multiplier": 0.7, "shared_intermediate_size": 48}),
    "cohere": Family({**TIED, "use_qk_norm": True}),
    "cohere2": Family({**TIED, "sliding_window": 32}),
    "stablelm": Family({"partial_rotary_factor": 0.25}),
    "gptj": Family({**GPT, "rotary_dim": 16}),
    "opt": Family({"ffn_dim": 96, "word_embed_proj_dim": WIDTH, **WITHOUT_HEADS}),
    "bloom": Family({"n_layer": LAYERS, "n_head": 2}),
    "falcon": Family({"new_decoder_architecture": True, "num_kv_heads": 1}),
    "falcon_7b": Family({"new_decoder_architecture": False, "multi_query": True}, model_type="falcon"),
    "falcon_rw": Family(
        {"new_decoder_architecture": False, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
        model_type="falcon",
    ),
    "phimoe": Family(LOCAL_EXPERTS),
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
    "minimax_m2": Family({**HEAD, **LOCAL_EXPERTS}),
    "llama4": Family(
        {**HEAD, **LOCAL_EXPERTS, "intermediate_size_mlp": 96, "attention_chunk_size": 64}, model_type="llama4_text"
    ),
    "deepseek_v2": Family(
        {
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
            "num_key_value_heads": 2,
        }
    ),
    "afmoe": Family({**HEAD, **EXPERTS, "sliding_window": 32, "num_dense_layers": 1}),
    "hunyuan_v1_dense": Family(HEAD),
    "hyperclovax": Family(HEAD),
    "hy_v3": Family({**HEAD, **EXPERTS}),
    "dbrx": Family({"d_model": WIDTH, "n_heads": 2, "n_layers": LAYERS, "max_seq_len": 256}),
    "ministral3": Family(HEAD),
    "ministral": Family(HEAD),
    "lfm2": Family(),
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
    "vaultgemma": Family({**HEAD, **TIED, "sliding_window": 32, "query_pre_attn_scalar": 32}),
    "cwm": Family(HEAD),
}
"""Name -> its model."""


def make_family(name: str, folder: Path) -> None:
    """Writes the model of one family, with random weights, as transformers would."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    fields = {key: value for key, value in {**BASE, **family.config}.items() if value is not None}
    config = AutoConfig.for_model(family.model_type or name, **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_scale = parameter.dim() == 1 and parameter_name.endswith("weight")
            parameter.normal_(1.0 if is_scale else 0.0, 0.1)
    model.save_pretrained(folder)
