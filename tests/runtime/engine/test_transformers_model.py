"""Families outside the table: transformers' own modules, state, buffers and tensors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from optim.recipes.errors import OptimError
from optim.runtime.engine.load import load_model

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "mamba": {},
    "falcon_mamba": {},
    "rwkv": {"attention_hidden_size": 32},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8},
    "starcoder2": {"num_key_value_heads": 2},
    "cohere": {"num_key_value_heads": 2},
    "apertus": {"num_key_value_heads": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2},
    "gpt2": {},
    "bloom": {},
}
Make = Callable[[str], tuple[Path, Any]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(kind) -> a folder with a random fp32 model, and the model."""

    def build(kind: str) -> tuple[Path, Any]:
        from transformers import AutoConfig, AutoModelForCausalLM

        factory: Any = AutoModelForCausalLM
        torch.manual_seed(0)
        model = factory.from_config(AutoConfig.for_model(kind, **SIZES | KINDS[kind])).float()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.normal_(0, 0.3)
        model.save_pretrained(tmp_path / kind)
        return tmp_path / kind, factory.from_pretrained(tmp_path / kind).eval()

    return build


def _ids(count: int) -> Tensor:
    return torch.randint(3, 96, (1, count), generator=torch.Generator().manual_seed(3))


def _close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_the_whole_text(kind: str, make: Make) -> None:
    folder, model = make(kind)
    ids = _ids(16)
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
    ours = load_model(str(folder), device="cpu")
    cache = ours.new_cache(1)
    _close(ours.forward(ids[:, :10], cache, all_logits=True), wanted[:, :10])
    for end in range(10, 16):
        _close(ours.forward(ids[:, end : end + 1], cache), wanted[:, end])
    cache.truncate(7)  # a turn that is taken back, and another one
    _close(ours.forward(ids[:, 7:12], cache), wanted[:, 11])
    _close(ours.forward(ids[:, 12:13], cache), wanted[:, 12])


def test_stored_buffers_are_read(make: Make) -> None:
    folder, _ = make("apertus")
    path, ids = folder / "model.safetensors", _ids(8)
    before = load_model(str(folder), device="cpu")
    first = before.forward(ids, before.new_cache(1))
    changed = {k: v + 0.5 if k.endswith("beta") else v for k, v in load_file(path).items()}
    save_file(changed, path, {"format": "pt"})
    after = load_model(str(folder), device="cpu")
    assert not torch.allclose(first, after.forward(ids, after.new_cache(1)), atol=1e-2)


def test_tensors_of_another_shape_are_refused(make: Make) -> None:
    folder, _ = make("starcoder2")
    path = folder / "model.safetensors"
    stored = load_file(path)
    for name in ("model.norm.weight", "model.layers.0.mlp.c_fc.weight"):
        cut = {k: v[:7].contiguous() if k == name else v for k, v in stored.items()}
        save_file(cut, path, {"format": "pt"})
        with pytest.raises(OptimError, match=rf"{name} is .*, expected"):
            load_model(str(folder), device="cpu")
