"""What families of the table publish in their config.json, one row a variant.

A variant is laid over the family's base and written as it stands: nulls, old spellings and all. A
value of `ABSENT` takes the key out.
"""

from typing import Any

ABSENT = object()
BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
    },
    "smollm3": {"num_hidden_layers": 4},
    "phi3": {},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "num_hidden_layers": 6,
    },
    "olmo2": {},
    "olmo3": {"sliding_window": 8, "num_hidden_layers": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 64, "num_key_value_heads": ABSENT},
    "gpt_neox": {"num_key_value_heads": ABSENT},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}
ROPES: dict[str, dict[str, Any]] = {
    "rope null": {"rope_scaling": None},
    "rope linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "rope dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "rope yarn": {"rope_scaling": YARN},
    "rope yarn, truncate off": {"rope_scaling": YARN | {"truncate": False, "beta_fast": 8}},
    "rope yarn, attention factor": {"rope_scaling": YARN | {"attention_factor": 1.3}},
    "rope llama3": {"rope_scaling": LLAMA3, "rope_theta": 5e5},
    "rope parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
    "rope parameters llama3": {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    "rope longrope": {
        "rope_scaling": LONG | {"type": "longrope", "original_max_position_embeddings": 64}
    },
    "rope longrope, crossing": {
        "rope_scaling": LONG | {"type": "longrope", "original_max_position_embeddings": 24}
    },
    "theta": {"rope_theta": 333.0},
}
HEADS: dict[str, dict[str, Any]] = {
    "base": {},
    "kv heads null": {"num_key_value_heads": None},
    "one kv head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "eps": {"rms_norm_eps": 0.3},
}
NO_NULL = {k: v for k, v in HEADS.items() if "null" not in k}  # their classes refuse a null
WIDE = {"head dim": {"head_dim": 32}}
SLIDING = {"window null": {"sliding_window": None}, "window": {"sliding_window": 5}}
BIAS = {"attention bias": {"attention_bias": True}, "no bias": {"attention_bias": False}}
RELU = {"relu": {"hidden_act": "relu"}, "gelu": {"hidden_act": "gelu"}}
LATE = {
    "window off": {"use_sliding_window": False, "sliding_window": 8},
    "window late": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "window types": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
CAPS = {
    "caps null": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "caps": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "scalar": {"query_pre_attn_scalar": 24},
}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": HEADS
    | WIDE
    | BIAS
    | RELU
    | ROPES
    | {
        "mlp bias": {"mlp_bias": True},
        "head dim null": {"head_dim": None},
        "keys of others": {
            "sliding_window": 4,
            "query_pre_attn_scalar": 7,
            "final_logit_softcapping": 1.0,
            "attention_multiplier": 3.0,
            "embedding_multiplier": 9.0,
            "hidden_activation": "relu",
            "use_parallel_residual": True,
            "do_layer_norm_before": False,
            "num_experts": 4,
        },
        "partial rotary": {"partial_rotary_factor": 0.5},
    },
    "mistral": NO_NULL | WIDE | SLIDING | ROPES,
    "qwen2": HEADS | LATE | ROPES,
    "qwen3": HEADS | WIDE | BIAS | LATE | ROPES,
    "granite": HEADS
    | BIAS
    | {
        "mlp bias": {"mlp_bias": True},
        "multipliers absent": {
            "embedding_multiplier": ABSENT,
            "logits_scaling": ABSENT,
            "residual_multiplier": ABSENT,
            "attention_multiplier": ABSENT,
        },
        "rope yarn": ROPES["rope yarn"],
    },
    "smollm3": HEADS
    | BIAS
    | {
        "interval": {"no_rope_layer_interval": 2},
        "list": {"no_rope_layers": [1, 0, 0, 1]},
        "window": {"use_sliding_window": True, "sliding_window": 8},
        "window unused": {"sliding_window": 8},
        "mlp bias": {"mlp_bias": True},
        "rope yarn": ROPES["rope yarn"],
        "theta": ROPES["theta"],
    },
    "phi3": HEADS
    | SLIDING
    | {
        "rope null": {"rope_scaling": None},
        "partial rotary": {"partial_rotary_factor": 0.75},
        "longrope": {
            "original_max_position_embeddings": 64,
            "rope_scaling": LONG | {"type": "longrope"},
        },
        "longrope, crossing": {
            "original_max_position_embeddings": 24,
            "rope_scaling": LONG | {"type": "longrope"},
        },
        "longrope, partial rotary": {
            "original_max_position_embeddings": 24,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {key: values[:6] for key, values in LONG.items()}
            | {"type": "longrope"},
        },
    },
    "gemma2": NO_NULL
    | BIAS
    | CAPS
    | {
        "types": {"layer_types": ["full_attention", "sliding_attention"]},
        "hidden_act": {"hidden_act": "relu"},
        "activation": {"hidden_activation": "gelu"},
        "rope linear": ROPES["rope linear"],
    },
    "gemma3_text": NO_NULL
    | BIAS
    | CAPS
    | {
        "pattern": {"sliding_window_pattern": 2},
        "types": {"layer_types": ["full_attention", "sliding_attention"] * 3},
        "rope linear": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        "rope yarn": ROPES["rope yarn"],
        "local theta": {"rope_local_base_freq": 99.0, "rope_theta": 5e4},
        "rope parameters": {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    },
    "olmo2": HEADS | BIAS | ROPES,
    "olmo3": HEADS
    | BIAS
    | {
        "types": {"layer_types": ["full_attention", "sliding_attention"] * 2},
        "rope yarn": ROPES["rope yarn, attention factor"],
        "theta": ROPES["theta"],
    },
    "opt": {
        "base": {},
        "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
        "projected": {"word_embed_proj_dim": 32},
        "width null": {"word_embed_proj_dim": None},
        "no bias": {"enable_bias": False},
        "not affine": {"layer_norm_elementwise_affine": False},
        "not affine, after": {
            "layer_norm_elementwise_affine": False,
            "do_layer_norm_before": False,
        },
        "no final norm": {"_remove_final_layer_norm": True},
        "gelu": {"activation_function": "gelu"},
        "untied": {"tie_word_embeddings": False},
        "kv heads": {"num_key_value_heads": 2, "head_dim": 4},
    },
    "gpt_neox": {
        "base": {},
        "whole rotary": {"rotary_pct": 1.0},
        "rotary base": {"rotary_emb_base": 500},
        "in sequence": {"use_parallel_residual": False},
        "no bias": {"attention_bias": False},
        "tied": {"tie_word_embeddings": True},
        "gelu fast": {"hidden_act": "gelu_fast"},
        "eps": {"layer_norm_eps": 1e-2},
        "rope linear": ROPES["rope linear"],
    },
    "mixtral": NO_NULL
    | WIDE
    | SLIDING
    | {
        "one expert": {"num_experts_per_tok": 1},
        "theta": ROPES["theta"],
        "rope parameters": ROPES["rope parameters"],
    },
    "qwen3_moe": {
        "base": {},
        "one kv head": {"num_key_value_heads": 1},
        "eps": {"rms_norm_eps": 0.3},
        "tied": {"tie_word_embeddings": True},
        "normalized": {"norm_topk_prob": True},
        "some plain": {"mlp_only_layers": [0]},
        "sparse step": {"decoder_sparse_step": 2},
        "window unused": {"sliding_window": 8},
        "window": {"use_sliding_window": True, "sliding_window": 8},
        "attention bias": {"attention_bias": True},
        "rope yarn": ROPES["rope yarn"],
    },
}
CASES = [(family, name) for family, rows in VARIANTS.items() for name in rows]


def config_of(family: str, variant: str) -> dict[str, Any]:
    """config.json of a variant."""
    whole = BASE | FAMILY[family] | VARIANTS[family][variant]
    return {"model_type": family} | {k: v for k, v in whole.items() if v is not ABSENT}
