"""The decoder against transformers' modeling code, on a tiny random model of every family."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optim.runtime.engine.load import Model, load_model

BASE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 72,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [2.0, 3.0, 4.0],
}
GEMMA = {"sliding_window": 7, "head_dim": 20, "query_pre_attn_scalar": 24}
NO_GROUPS = {"num_key_value_heads": None}  # these families know none
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-odd-head": ("Llama", {"head_dim": 20, "attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-dynamic": (
        "Llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0},
            "max_position_embeddings": 24,
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 20}),
    "phi3": ("Phi3", {"sliding_window": 9}),
    "phi3-longrope": (
        "Phi3",
        {"rope_parameters": LONG, "original_max_position_embeddings": 24},
    ),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": ("Gemma3Text", GEMMA | {"sliding_window_pattern": 2}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
        },
    ),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {"sliding_window": 7, "num_hidden_layers": 4}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "opt": ("OPT", {"ffn_dim": 88, "word_embed_proj_dim": 72, **NO_GROUPS}),
    "opt-350m": (
        "OPT",
        {"ffn_dim": 88, "word_embed_proj_dim": 40, "do_layer_norm_before": False, **NO_GROUPS},
    ),
    "gpt_neox": ("GPTNeoX", NO_GROUPS),
    "gpt_neox-serial": (
        "GPTNeoX",
        {"use_parallel_residual": False, "attention_bias": False, **NO_GROUPS},
    ),
    # Families outside the table go through transformers' modules.
    "starcoder2": ("Starcoder2", {}),
    "gpt2": ("GPT2", {"n_embd": 72, "n_layer": 2, "n_head": 6}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": 7}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "head_dim": 20,
            "mlp_only_layers": [1],
        },
    ),
}
Oracle = Callable[..., Tensor]


def _oracle(name: str, folder: Path) -> Any:
    """A random model of the family in fp32, saved to `folder`; norms and biases are random too."""
    import transformers

    kind, extra = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        **{k: v for k, v in (BASE | extra).items() if v is not None}
    )
    config._attn_implementation = "eager"
    model: Any = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn_like(weight)
            weight.copy_(noise * 0.3 if weight.dim() > 1 else weight + noise * 0.2)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    return _oracle(request.param, folder), load_model(str(folder), device="cpu")


def _close(ours: Tensor, theirs: Tensor) -> None:
    scale = theirs.abs().max()
    assert (ours - theirs).abs().max() / scale < 2e-5


def _ids(batch: int, length: int) -> Tensor:
    return torch.randint(3, BASE["vocab_size"], (batch, length))


def test_prefill_past_the_window(pair: tuple[Any, Model]) -> None:
    theirs, ours = pair
    ids = _ids(2, 40)
    with torch.no_grad():
        wanted = theirs(ids, use_cache=False).logits
    cache = ours.new_cache(batch=2, length=64)
    _close(ours.forward(ids, cache, all_logits=True), wanted)


def test_steps_equal_transformers_steps(pair: tuple[Any, Model]) -> None:
    theirs, ours = pair
    ids = _ids(1, 30)
    cache, past = ours.new_cache(length=64), None
    crossing = getattr(ours.decoder, "crossing", None)
    for end in range(17, 31):
        afresh = end == 17 or crossing == end - 1  # generate() reads all again there
        with torch.no_grad():
            part = ids[:, :end] if afresh else ids[:, end - 1 : end]
            out = theirs(part, past_key_values=None if afresh else past, use_cache=True)
        past = out.past_key_values
        _close(ours.forward(ids[:, cache.length : end], cache), out.logits[:, -1])


def test_left_padding_changes_nothing(pair: tuple[Any, Model]) -> None:
    _, ours = pair
    long, short = _ids(1, 22), _ids(1, 12)
    batch = torch.cat((long, torch.nn.functional.pad(short, (10, 0))))
    cache = ours.new_cache(batch=2, length=64, padding=[0, 10])
    step = _ids(2, 1)
    first, second = ours.forward(batch, cache), ours.forward(step, cache)
    for row, alone in enumerate((long, short)):
        solo = ours.new_cache(length=64)
        _close(first[row], ours.forward(alone, solo)[0])
        _close(second[row], ours.forward(step[row : row + 1], solo)[0])
