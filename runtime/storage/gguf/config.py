"""A Hugging Face configuration from GGUF metadata, for the architectures known here.

transformers' own reader is not used for this: it drops rope scaling, soft caps and multipliers.
"""

import math
import re
from pathlib import Path
from typing import Any

import torch

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.storage.gguf.file import GgufTensor, read_rows
from optim.runtime.system.files import damaged

MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "phi3": "phi3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "granite": "granite",
    "olmo2": "olmo2",
    "smollm3": "smollm3",
}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
# Metadata key (after the architecture's prefix) -> configuration key.
COMMON = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
REQUIRED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
TOKEN_IDS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "padding_token_id": "pad_token_id",
}
ROPE_TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
LAYER = re.compile(r"blk\.(\d{1,9})\.")


def _common(path: Path, arch: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """The keys whose value is the same in both worlds; all of them are numbers."""
    keys = {f"{arch}.{key}": ours for key, ours in COMMON.items()}
    keys |= {f"tokenizer.ggml.{key}": ours for key, ours in TOKEN_IDS.items()}
    found = {ours: _number(path, metadata, key) for key, ours in keys.items()}
    return {ours: value for ours, value in found.items() if value is not None}


def _number(path: Path, metadata: dict[str, Any], key: str) -> Any:
    """The number at `key`, None if there is none; OptimError (2) for anything else."""
    value = metadata.get(key)
    if isinstance(value, list) and value and value.count(value[0]) == len(value):
        value = value[0]  # one for each layer, all alike
    if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
        damaged(path, f"{key} is {value!r}, where a number is expected")
    return value


def _check_blocks(path: Path, blocks: int, table: dict[str, GgufTensor]) -> None:
    """Refuse a number of blocks that the tensor table does not bear out."""
    numbers = {int(match[1]) for name in table if (match := LAYER.match(name))}
    there = max(numbers, default=-1) + 1
    if len(numbers) != there or blocks != there:
        damaged(path, f"it has the tensors of {len(numbers)} blocks, its block_count is {blocks}")


def _model_type(path: Path, arch: Any, metadata: dict[str, Any]) -> str:
    if not isinstance(arch, str) or arch not in MODEL_TYPES:
        raise OptimError(
            f"{path}: GGUF files of the architecture {arch!r} are not supported",
            f"use the Hugging Face folder of the model; known: {', '.join(MODEL_TYPES)}",
            USAGE,
        )
    if arch == "llama" and metadata.get("llama.expert_count"):
        return "mixtral"
    if arch == "olmo2" and metadata.get("olmo2.attention.sliding_window"):
        return "olmo3"
    return MODEL_TYPES[arch]


def llama3_scaling(factors: torch.Tensor, theta: float) -> dict[str, Any] | None:
    """Llama 3's rope scaling that gives these per-frequency `factors` [head_dim / 2], or None.

    The converter stores 1 for short wave lengths, `factor` for long ones and a blend between.
    """
    half = factors.numel()
    wave = 2 * math.pi * theta ** (torch.arange(half, dtype=torch.float64) / half)
    factor, low, high, context = float(factors.max()), 1.0, 4.0, 8192
    blend = ((context / wave - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - blend) / factor + blend)
    if not torch.allclose(expected, factors.double(), rtol=1e-3):
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def _rope_scaling(
    path: Path, arch: str, metadata: dict[str, Any], tables: dict[str, torch.Tensor]
) -> dict[str, Any] | None:
    """`rope_scaling` from the metadata and the rope tensors of the file."""
    original = _number(path, metadata, f"{arch}.rope.scaling.original_context_length")
    long, short = (tables.get(f"rope_factors_{kind}.weight") for kind in ("long", "short"))
    if long is not None and short is not None:
        factors = {"long_factor": long.tolist(), "short_factor": short.tolist()}
        return {"rope_type": "longrope", **factors}
    if "rope_freqs.weight" in tables:
        theta = float(_number(path, metadata, f"{arch}.rope.freq_base") or 10000.0)
        scaling = llama3_scaling(tables["rope_freqs.weight"], theta)
        if scaling is None:
            fix = "use the Hugging Face folder of the model"
            raise OptimError(f"{path}: its rope_freqs are not Llama 3's", fix, USAGE)
        return scaling
    kind = metadata.get(f"{arch}.rope.scaling.type", "none")
    if kind == "none":
        return None
    factor = _number(path, metadata, f"{arch}.rope.scaling.factor") or 1.0
    scaling = {"rope_type": kind, "factor": factor}
    return scaling | ({"original_max_position_embeddings": original} if original else {})


def _own_keys(
    path: Path, arch: str, config: dict[str, Any], metadata: dict[str, Any]
) -> dict[str, Any]:
    """What a single family adds."""
    experts = _number(path, metadata, f"{arch}.expert_count")
    if config["model_type"] == "mixtral":
        return {"num_local_experts": experts}
    if config["model_type"] == "qwen3_moe":
        return {"num_experts": experts, "norm_topk_prob": True}
    if arch in ("gemma2", "gemma3"):
        # The largest of both generations scales its queries by hidden / heads, not by head_dim.
        largest = config["num_hidden_layers"] == (46 if arch == "gemma2" else 62)
        per_head = config["hidden_size"] // config["num_attention_heads"]
        return {"query_pre_attn_scalar": per_head if largest else config.get("head_dim", 256)}
    if arch == "phi3":
        original = _number(path, metadata, "phi3.rope.scaling.original_context_length")
        return {"original_max_position_embeddings": original} if original else {}
    return {}


def gguf_config(
    path: Path, metadata: dict[str, Any], table: dict[str, GgufTensor], data: int
) -> dict[str, Any]:
    """config.json's contents for a GGUF file.

    Raises OptimError (2) for an unknown architecture, missing keys, an unknown rope scaling.
    """
    arch = metadata.get("general.architecture")
    config: dict[str, Any] = {"model_type": _model_type(path, arch, metadata)}
    arch = str(arch)
    config["architectures"] = [CLASSES[config["model_type"]]]
    config |= _common(path, arch, metadata)
    integers = {key: config.get(key) for key in REQUIRED}
    if wrong := [key for key, value in integers.items() if type(value) is not int or value <= 0]:
        damaged(path, f"its metadata gives no usable {wrong[0]}")
    _check_blocks(path, config["num_hidden_layers"], table)
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    if arch in ("llama", "granite", "smollm3"):
        config.setdefault("head_dim", _number(path, metadata, f"{arch}.rope.dimension_count"))
        config["attention_bias"] = "blk.0.attn_q.bias" in table
    if "token_embd.weight" not in table:
        damaged(path, "it has no token_embd.weight")
    config["vocab_size"] = table["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in table
    ropes = {
        name: read_rows(path, data, table[name], 0, 1)[0] for name in ROPE_TABLES if name in table
    }
    if scaling := _rope_scaling(path, arch, metadata, ropes):
        config["rope_scaling"] = scaling
    return config | _own_keys(path, arch, config, metadata)
