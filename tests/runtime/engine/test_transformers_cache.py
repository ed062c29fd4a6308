"""Our caches in transformers' own modeling code and its `generate`."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, OPTConfig

from optim.recipes.errors import OptimError
from optim.runtime.cache import quantized
from optim.runtime.cache.streaming import SINKS
from optim.runtime.engine.transformers_cache import StreamCacheLayer, packed_cache, stream_cache


def _llama(layers: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def _ids(length: int, batch: int = 1) -> Tensor:
    return torch.randint(3, 101, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def _steps(model: Any, ids: Tensor, cache: Any) -> Tensor:
    parts = ids[:, :20], *ids[:, 20:].split(1, 1)
    return torch.stack([model(x, past_key_values=cache).logits[:, -1] for x in parts], 1)


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_logits_stay_close(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "RECENT", 4)
    model, ids = _llama(2), _ids(50, batch=2)
    exact = _steps(model, ids, DynamicCache())
    cache = packed_cache(model.config, bits)
    found = _steps(model, ids, cache)
    assert (found - exact).square().mean().sqrt() < {8: 0.02, 4: 0.3}[bits] * exact.std()
    cache.crop(-10)
    assert cache.get_seq_length() == 40
    with torch.inference_mode():
        again = model(ids[:, 40:41], past_key_values=cache).logits[:, -1]
    assert (again - exact[:, 21]).square().mean().sqrt() < {8: 0.02, 4: 0.4}[bits] * exact.std()


def test_generate_takes_packed_caches_and_beams() -> None:
    model, ids = _llama(2), _ids(9, batch=2)
    mask = torch.ones_like(ids)
    for beams in (1, 3):
        options = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams}
        plain = model.generate(ids, attention_mask=mask, **options)
        cache = packed_cache(model.config, 8)
        ours = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
        assert cache.get_seq_length() == 20
        assert (plain == ours).float().mean() > 0.9


@pytest.mark.parametrize("first", [1, 20, 60])
def test_a_stream_in_one_layer_is_exact(first: int) -> None:
    model, ids = _llama(1), _ids(100)
    cache = stream_cache(model.config, 32)
    (layer,) = cache.layers
    assert isinstance(layer, StreamCacheLayer)
    with torch.inference_mode():
        for part in (ids[:, :first], *ids[:, first:].split(1, 1)):
            logits = model(part, past_key_values=cache).logits[:, -1]
        kept = torch.cat((ids[:, :SINKS], ids[:, SINKS + layer.gone :]), 1)
        assert kept.shape[1] == 32
        fresh = model(kept).logits[:, -1]
    assert torch.allclose(logits, fresh, atol=1e-4 * float(fresh.abs().max()))
    assert cache.get_seq_length() == 100


def test_generate_streams_past_the_window() -> None:
    model, ids = _llama(2), _ids(40)
    cache = stream_cache(model.config, 32)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=60,
        do_sample=False,
    )
    assert out.shape == (1, 100)
    assert all(layer.keys.shape[2] == 32 for layer in cache.layers)


def test_what_cannot_be_is_refused() -> None:
    model = _llama(1)
    opt = OPTConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=4, ffn_dim=32)
    for make in (
        lambda: packed_cache(model.config, 5),
        lambda: stream_cache(model.config, 8),
        lambda: stream_cache(opt, 64),
        lambda: model(_ids(4, batch=2), past_key_values=stream_cache(model.config, 32)),
    ):
        with pytest.raises(OptimError) as caught:
            make()
        assert caught.value.code == 2
