"""A small random model of every kind of artifact, made by the commands that make real ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

VOCABULARY, CONTEXT = 264, 128
HIDDEN, HEADS, KV_HEADS, HEAD, EXPERTS, INNER = 64, 4, 2, 16, 4, 32
EXACT = 0.001
"""Share of a row of logits that another order of sums may move."""
CODES = 0.05
"""The same where activations become integers: because of it a code can fall the other way."""
LINES = "\n".join(f"Line {i}: {'abcdefghij'[i % 10] * 3} {i * i}." for i in range(60))
CALIBRATION = {"dataset": "some.txt", "num_samples": 2, "seq_len": 32}


@dataclass(frozen=True, slots=True)
class Kind:
    """Of what an artifact is made, by which section of a recipe, and how far logits may differ."""

    source: str
    section: str
    keys: Mapping[str, Any]
    bound: float = EXACT


AWQ = {"method": "awq", "group_size": 32, "n_grid": 2, "duo": False, "clip": False}
THRESHOLD = {"method": "threshold", "sparsity": 0.4, "allocation": "uniform"}
CORE = {"method": "coreinfer", "keep": 0.5, "score": "griffin"}
KINDS = {
    "awq 4 bit": Kind("plain bf16", "quantize", AWQ | {"bits": 4}, CODES),
    "awq 3 bit": Kind("plain bf16", "quantize", AWQ | {"bits": 3}, CODES),
    "awq 8 bit": Kind("plain bf16", "quantize", AWQ | {"bits": 8, "lm_head_bits": 8}, CODES),
    "awq 4 bit, experts": Kind("experts bf16", "quantize", AWQ | {"bits": 4}, CODES),
    "static w4a8": Kind(
        "plain bf16", "quantize", {"method": "mergequant", "act_bits": 8, "prefix": False}, CODES
    ),
    "static w4a4": Kind("plain bf16", "quantize", {"method": "mergequant", "act_bits": 4}, CODES),
    "bf12": Kind("plain bf16", "pack", {"layout": "bf12"}),
    "df11": Kind("plain bf16", "pack", {"layout": "df11"}),
    "thresholds": Kind("plain bf16", "prune", THRESHOLD),
    "thresholds, awq 4 bit": Kind("awq 4 bit", "prune", THRESHOLD, CODES),
    "core neurons": Kind("plain bf16", "prune", CORE),
    "core neurons, awq 4 bit": Kind("awq 4 bit", "prune", CORE, CODES),
    "relu, exact": Kind("relu bf16", "prune", {"method": "relu-exact"}),
}
LLAMA: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
PLAIN: dict[str, dict[str, Any]] = {
    "plain bf16": LLAMA,
    "relu bf16": LLAMA | {"hidden_act": "relu"},
    "experts bf16": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": INNER,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}
NAMES = (*PLAIN, *KINDS)
BOUNDS = {name: KINDS[name].bound if name in KINDS else EXACT for name in NAMES}


def make(folder: Path) -> None:
    """Write one model of each of NAMES to `folder`/its name."""
    (folder / "some.txt").write_text(LINES, encoding="utf-8")
    for name, config in PLAIN.items():
        _write_plain(folder / name, config)
    for name, kind in KINDS.items():
        _compress(folder, name, kind)


def _compress(folder: Path, name: str, kind: Kind) -> None:
    from optim.recipes.schema import Recipe

    recipe = Recipe.model_validate(
        {
            "version": 1,
            "model": str(folder / kind.source),
            "output": str(folder / name),
            "calibration": CALIBRATION | {"dataset": str(folder / "some.txt")},
            kind.section: dict(kind.keys),
        }
    )
    given: dict[str, Any] = {"device": "cpu"}
    if recipe.pack is not None and recipe.model is not None:
        from optim.export.lossless.pack import pack
        from optim.export.lossless.plan import plan as plan_pack

        pack(plan_pack(recipe.model, recipe.pack, recipe.output), _silent)
    elif recipe.prune is not None:
        from optim.prune.run import plan as plan_prune
        from optim.prune.run import prune

        prune(plan_prune(recipe, **given), _silent)
    else:
        from optim.quant.run import plan as plan_quantize
        from optim.quant.run import quantize

        quantize(plan_quantize(recipe, **given), _silent)


def _silent(_at: int, _total: int, _text: str) -> None:
    pass


def _write_plain(folder: Path, config: dict[str, Any]) -> None:
    """A model with random weights and a tokenizer of bytes."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "max_position_embeddings": CONTEXT,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(sizes | config), encoding="utf-8")
    random = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, shape in _shapes(config):
        noise = torch.randn(shape, generator=random)
        value = 1 + 0.2 * noise if len(shape) == 1 else 0.15 * noise
        tensors[name] = value.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    _write_tokenizer(folder)


def _shapes(config: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """Every tensor of a model, and its shape."""
    found: list[tuple[str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", (VOCABULARY, HIDDEN)),
        ("model.norm.weight", (HIDDEN,)),
    ]
    for block in ("model.layers.0", "model.layers.1"):
        for name, rows in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS), ("o", HEADS)):
            found.append((f"{block}.self_attn.{name}_proj.weight", (rows * HEAD, HIDDEN)))
        for name in ("input_layernorm", "post_attention_layernorm"):
            found.append((f"{block}.{name}.weight", (HIDDEN,)))
        if "num_experts" not in config:
            found += [
                (f"{block}.mlp.{n}_proj.weight", (HIDDEN,) * 2) for n in ("gate", "up", "down")
            ]
            continue
        found += [(f"{block}.self_attn.{n}_norm.weight", (HEAD,)) for n in "qk"]
        found.append((f"{block}.mlp.gate.weight", (EXPERTS, HIDDEN)))
        for expert in (f"{block}.mlp.experts.{i}" for i in range(EXPERTS)):
            found += [(f"{expert}.{n}_proj.weight", (INNER, HIDDEN)) for n in ("gate", "up")]
            found.append((f"{expert}.down_proj.weight", (HIDDEN, INNER)))
    return found


def _write_tokenizer(folder: Path) -> None:
    """Three special tokens, then one token a byte."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    special = ["<pad>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate([*special, *letters])}, []))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}', encoding="utf-8")
