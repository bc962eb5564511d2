"""Settings of families that change what their layers compute, and families that came later: see families.py.

Windows are shorter than the prompts of the test, so that they show in the rows.
"""

from tests.engine.families import HEAD, LAYERS, TIED, WIDTH, WITHOUT_HEADS, Family

WINDOW = 8

GEMMA4 = {
    **HEAD,
    **TIED,
    "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "global_head_dim": 32,
}
"""Its attention scores are not divided by anything: the norms' weights are small here, so that float32 suffices."""

VARIANTS: dict[str, Family] = {
    "exaone4_window": Family({**HEAD, "sliding_window": WINDOW, "sliding_window_pattern": 2}, model_type="exaone4"),
    "gemma3_window": Family(
        {**HEAD, **TIED, "sliding_window": WINDOW, "sliding_window_pattern": 2, "query_pre_attn_scalar": 32},
        model_type="gemma3_text",
        norm_weight=0.0,
    ),
    "gemma4": Family(GEMMA4, model_type="gemma4_text", norm_weight=0.4),
    "gemma4_experts": Family(
        {
            **GEMMA4,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 48,
            "global_head_dim": 64,
        },
        model_type="gemma4_text",
        norm_weight=0.4,
    ),
    "gpt_neox_sequential": Family({**WITHOUT_HEADS, "use_parallel_residual": False}, model_type="gpt_neox"),
    "granite_window": Family(
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.2,
            "sliding_window": WINDOW,
        },
        model_type="granite_swa",
    ),
    "llama_tied_with_biases": Family({**HEAD, **TIED, "attention_bias": True, "mlp_bias": True}, model_type="llama"),
    "mistral_window": Family({**HEAD, "sliding_window": WINDOW}, model_type="mistral"),
    "olmo3_window": Family({"sliding_window": WINDOW}, model_type="olmo3"),
    "opt_350m": Family(
        {"ffn_dim": 96, "word_embed_proj_dim": WIDTH // 2, "do_layer_norm_before": False, **WITHOUT_HEADS},
        model_type="opt",
    ),
    "phi_qk_norm": Family({"qk_layernorm": True}, model_type="phi"),
    "qwen2_window": Family(
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": LAYERS,
            "layer_types": ["sliding_attention"] * LAYERS,
        },
        model_type="qwen2",
    ),
    "starcoder2_window": Family({"sliding_window": WINDOW}, model_type="starcoder2"),
}
"""Name -> its model."""

VARIANTS_EVERY_TIME = ("gemma4",)
"""Variants that the usual test run proves."""

VARIANT_CLASSES: dict[str, str] = {
    "exaone4_window": "vllm.model_executor.models.exaone4.Exaone4DecoderLayer",
    "gemma3_window": "vllm.model_executor.models.gemma3.Gemma3DecoderLayer",
    "gemma4": "vllm.model_executor.models.gemma4.Gemma4DecoderLayer",
    "gemma4_experts": "vllm.model_executor.models.gemma4.Gemma4DecoderLayer",
    "gpt_neox_sequential": "transformers.models.gpt_neox.modeling_gpt_neox.GPTNeoXLayer",
    "granite_window": "vllm.model_executor.models.granite.GraniteDecoderLayer",
    "llama_tied_with_biases": "vllm.model_executor.models.llama.LlamaDecoderLayer",
    "mistral_window": "vllm.model_executor.models.mistral.MistralDecoderLayer",
    "olmo3_window": "transformers.models.olmo3.modeling_olmo3.Olmo3DecoderLayer",
    "opt_350m": "vllm.model_executor.models.opt.OPTDecoderLayer",
    "phi_qk_norm": "transformers.models.phi.modeling_phi.PhiDecoderLayer",
    "qwen2_window": "vllm.model_executor.models.qwen2.Qwen2DecoderLayer",
    "starcoder2_window": "transformers.models.starcoder2.modeling_starcoder2.Starcoder2DecoderLayer",
}
"""Variant -> the class of its layers."""

MIXED_WINDOWS = Family(
    {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": LAYERS,
        "layer_types": ["full_attention", "sliding_attention"] * (LAYERS // 2),
    },
    model_type="qwen2",
)
"""vLLM gives no layer of this model the window, and transformers every second one."""

STRAY_WINDOW = Family({**HEAD, "sliding_window": WINDOW}, model_type="llama")
"""transformers ignores the window of this model, and vLLM gives it to every layer."""

CLIPPED = Family(
    {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "intermediate_size": 48,
        "clip_qkv": 0.05,
    },
    model_type="olmoe",
)
"""transformers clips queries, keys and values of this model, and vLLM does not."""

PER_LAYER_EMBEDDINGS = Family(
    {**GEMMA4, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 512},
    model_type="gemma4_text",
    norm_weight=0.4,
)
