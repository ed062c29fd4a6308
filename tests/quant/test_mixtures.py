"""Mixtures of families that the table does not have: quantized and run, or refused before work."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from optim.cli import main

Make = Callable[..., Path]
COMMON: dict[str, Any] = {
    **{"vocab_size": 264, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 4, "max_position_embeddings": 128, "intermediate_size": 64},
    **{"num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
KINDS: dict[str, dict[str, Any]] = {
    "Qwen2Moe": {"moe_intermediate_size": 32, "num_experts": 4},
    "DeepseekV3": {
        **{"moe_intermediate_size": 32, "n_routed_experts": 4, "n_group": 2, "topk_group": 1},
        **{"first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "v_head_dim": 16},
        **{"qk_rope_head_dim": 16, "qk_nope_head_dim": 16},
    },
    "GptOss": {"head_dim": 16, "num_local_experts": 4, "sliding_window": 16},
}
TEXT = ("--num-samples", "2", "--seq-len", "16", "--threads", "1", "--device", "cpu")


def make(kind: str, make_model: Make, folder: Path) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**COMMON | KINDS[kind])
    model: Any = transformers.AutoModelForCausalLM
    model.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for path in make_model("llama").glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def run(*words: object) -> int:
    with pytest.MonkeyPatch.context() as patch, open(os.devnull) as nothing:
        patch.setattr(sys, "stdin", nothing)
        patch.setattr(sys, "argv", ["optim", *map(str, words)])
        return main()


@pytest.mark.parametrize("method", ["rtn", "awq"])
@pytest.mark.parametrize("kind", ["Qwen2Moe", "DeepseekV3"])
def test_what_is_quantized_runs(
    kind: str, method: str, make_model: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also a linear of one output, the gate of a shared expert."""
    source, out = make(kind, make_model, tmp_path / "model"), tmp_path / "out"
    words = ("quantize", source, "-m", method, "--group-size", "32", *TEXT, "-o", out)
    assert run(*words, "--dry-run") == 0 and not out.exists()
    assert run(*words) == 0
    assert "KL " in capfd.readouterr().err
    assert run("run", out, "Hi", "--raw", "--max-tokens", "2", "--threads", "1") == 0


def test_experts_with_biases_are_refused_before_work(
    make_model: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = make("GptOss", make_model, tmp_path / "model")
    for words in (("quantize", source, *TEXT), ("run", source, "Hi", "--raw"), ("eval", source)):
        for dry in [("--dry-run",), ()] if words[0] == "quantize" else [()]:
            assert run(*words, *dry) == 2
            assert "not gate, up and down projections without biases" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_run_refuses_is_packed_and_not_offered_to_run(
    make_model: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, out = make("GptOss", make_model, tmp_path / "model"), tmp_path / "out"
    assert run("pack", source, "-o", out) == 0
    said = capfd.readouterr().err
    assert "`optim run` refuses it: " in said and "next:" not in said
    assert run("run", out, "Hi", "--raw") == 2
    card = (out / "README.md").read_text()
    assert "`optim run` refuses it: " in card and "In a terminal" not in card
    assert run("unpack", out, "-o", tmp_path / "back") == 0
