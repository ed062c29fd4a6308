"""The native format belongs to everyone: transformers loads it through compressed-tensors.

compressed-tensors multiplies integer by scale in the dtype of the scale, bf16; ours is exact. So
its logits equal ours up to bf16 rounding of the weights, and those of the kernels this machine
would choose (which may round activations to 8 bits) up to that.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from optim.runtime.decoder.linears import pack_quantized
from optim.runtime.engine.load import load_model
from optim.runtime.formats.pack_quantized import Scheme, pack, write_config

SCHEMES = [Scheme(4, 32, True), Scheme(4, 32, False), Scheme(4, 64, True), Scheme(4, 64, False)]
SCHEMES += [Scheme(8, 32, True), Scheme(8, -1, True)]


def _round(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """Round-to-nearest, in the stored form."""
    grouped = weight.view(weight.shape[0], scheme.groups(weight.shape[1]), -1)
    top = (1 << scheme.bits) - 1
    if scheme.symmetric:
        scale = (grouped.abs().amax(-1) * 2 / top).clamp(min=1e-4).bfloat16()
        zero, shift = None, torch.full_like(scale, 2.0 ** (scheme.bits - 1)).float()
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = ((high - low) / top).clamp(min=1e-4).bfloat16()
        shift = (-low / scale.float()).round().clamp(0, top)
        zero = shift.to(torch.uint8)
    q = (grouped / scale.float()[..., None] + shift[..., None]).round().clamp(0, top)
    return pack(q.to(torch.uint8).view_as(weight), scale, zero, scheme)


def _artifact(folder: Path, scheme: Scheme) -> None:
    """A tiny random llama, all linears but the head packed, in the native format."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.15,
    )
    tensors: dict[str, Tensor] = {}
    schemes = {}
    for name, weight in LlamaForCausalLM(config).state_dict().items():
        module = name.removesuffix(".weight")
        if weight.dim() == 2 and "_proj" in name:
            schemes[module] = scheme
            packed = _round(weight.float(), scheme)
            tensors |= {f"{module}.{key}": value for key, value in packed.items()}
        else:
            tensors[name] = weight.bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    written = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    written["quantization_config"] = write_config(schemes, ["lm_head"])
    (folder / "config.json").write_text(json.dumps(written))


def _theirs(folder: Path, ids: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    factory: Any = AutoModelForCausalLM
    model = factory.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits: Tensor = model(ids).logits.float()
    return logits


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_transformers_computes_the_same(
    scheme: Scheme, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _artifact(tmp_path, scheme)
    ids = torch.randint(0, 99, (2, 19))
    wanted = _theirs(tmp_path, ids)
    ours = load_model(str(tmp_path), device="cpu")
    chosen = ours.forward(ids, ours.new_cache(batch=2), all_logits=True)
    monkeypatch.setattr(pack_quantized, "_candidates", lambda _: [])
    exact_model = load_model(str(tmp_path), device="cpu")
    exact = exact_model.forward(ids, exact_model.new_cache(batch=2), all_logits=True)
    scale = wanted.abs().max()
    assert (exact - wanted).abs().max() / scale < 2e-2
    assert (chosen - exact).abs().max() / scale < 5e-2
