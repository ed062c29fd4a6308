"""The cache without an end: exact while nothing is gone, and after, where exactness is possible."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optim.recipes.errors import OptimError
from optim.runtime.cache.full import Policy
from optim.runtime.cache.streaming import SINKS, StreamCache
from optim.runtime.engine.load import Model, load_model

STREAM = Policy(kind="stream")
ROPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "partial": {"partial_rotary_factor": 0.5, "rope_theta": 500.0, "rope_type": "default"},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def _ids(length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 100, (1, length), generator=torch.Generator().manual_seed(seed))


def _one_layer(folder: Path, rope: dict[str, Any]) -> Model:
    """With one layer, keys and values depend on their token alone: streaming can be exact."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        rope_parameters={"rope_theta": 1e4, "rope_type": "default"} | rope,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return load_model(str(folder), device="cpu")


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Model:
    return load_model(str(make_model("llama", torch.float32)), device="cpu")


def test_it_is_the_full_cache_until_it_is_full(model: Model) -> None:
    full, stream = model.new_cache(length=64), model.new_cache(length=64, policy=STREAM)
    for part in (_ids(20), *_ids(44).split(1, 1)):
        assert torch.allclose(model.forward(part, full), model.forward(part, stream), atol=1e-4)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_one_layer_streams_as_if_computed_afresh(rope: str, chunk: int, tmp_path: Path) -> None:
    model, ids = _one_layer(tmp_path, ROPES[rope]), _ids(120)
    cache = model.new_cache(length=44, policy=STREAM)
    assert isinstance(cache, StreamCache)
    for part in ids.split(chunk, 1):
        logits = model.forward(part, cache)
    assert cache.length == 120
    assert cache.gone >= 120 - 44
    kept = torch.cat((ids[:, :SINKS], ids[:, SINKS + cache.gone :]), 1)
    assert 30 <= kept.shape[1] <= 44
    fresh = model.forward(kept, model.new_cache(length=64))
    assert torch.allclose(logits, fresh, atol=2e-4 * float(fresh.abs().max()))


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_neox", "smollm3"])
def test_an_endless_text_at_constant_memory(
    name: str, bits: int, make_model: Callable[..., Path]
) -> None:
    model = load_model(str(make_model(name, torch.float32)), device="cpu")
    cache = model.new_cache(length=32, policy=Policy(bits, "stream"))
    model.forward(_ids(100), cache)
    held = cache.nbytes
    for start in range(6):
        for token in _ids(60, start).split(1, 1):
            assert torch.isfinite(model.forward(token, cache)).all()
    assert cache.nbytes == held
    assert cache.length == 460


@torch.inference_mode()
def test_a_stream_at_a_far_place_goes_on_as_at_the_start(tmp_path: Path) -> None:
    model, ids = _one_layer(tmp_path, {}), _ids(60)
    near, far = (model.new_cache(length=32, policy=STREAM) for _ in range(2))
    assert isinstance(far, StreamCache)
    model.forward(ids, near)
    model.forward(ids[:, :8], far)
    far.gone = far.length = 10_000_000  # as if millions had been forgotten
    far.length += 8
    far.sinks = [layer.keys_at(0, SINKS).clone() for layer in far.layers]
    far.layers[0].put_keys(far.turns[0](far.sinks[0], far.gone), 0)  # type: ignore[misc]
    far.layers[0].put_keys(far.turns[0](far.layers[0].keys_at(4, 8), far.gone), 4)  # type: ignore[misc]
    for part in ids[:, 8:].split(1, 1):
        logits = model.forward(part, far)
    kept = torch.cat((ids[:, :4], ids[:, 60 - (far.length - far.gone) + 4 :]), 1)
    fresh = model.forward(kept, model.new_cache(length=64))
    assert torch.allclose(logits, fresh, atol=1e-3 * float(fresh.abs().max()))


def test_truncating_keeps_what_is_there_or_starts_again(model: Model) -> None:
    ids = _ids(90)
    cache = model.new_cache(length=44, policy=STREAM)
    assert isinstance(cache, StreamCache)
    model.forward(ids[:, :30], cache)
    cache.truncate(50)
    assert cache.length == 30
    cache.truncate(12)
    again = model.forward(ids[:, 12:40], cache)
    assert torch.allclose(again, model.forward(ids[:, :40], model.new_cache()), atol=1e-4)
    model.forward(ids[:, 40:], cache)
    gone = cache.gone
    cache.truncate(88)
    assert (cache.length, cache.gone) == (88, gone)
    cache.truncate(gone + 10)
    assert (cache.length, cache.gone) == (0, 0)
    fresh = model.new_cache(length=44, policy=STREAM)
    assert torch.equal(model.forward(ids, cache), model.forward(ids, fresh))


def test_an_interrupted_forgetting_leaves_an_empty_cache(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = model.new_cache(length=32, policy=STREAM)
    assert isinstance(cache, StreamCache)
    model.forward(_ids(32), cache)

    def stop(*_: object) -> Tensor:
        raise KeyboardInterrupt

    whole = cache.turns
    cache.turns = [stop] * len(whole)
    with pytest.raises(KeyboardInterrupt):
        model.forward(_ids(1), cache)
    cache.turns = whole
    assert cache.length == 0
    fresh = model.new_cache(length=32, policy=STREAM)
    assert torch.equal(model.forward(_ids(40), cache), model.forward(_ids(40), fresh))


def test_what_cannot_stream_is_refused(make_model: Callable[..., Path], model: Model) -> None:
    opt = load_model(str(make_model("opt", torch.float32)), device="cpu")
    for make in (
        lambda: opt.new_cache(policy=STREAM),
        lambda: model.new_cache(length=12, policy=STREAM),
        lambda: model.new_cache(batch=2, length=64, policy=STREAM),
    ):
        with pytest.raises(OptimError) as caught:
            make()
        assert caught.value.code == 2
        assert caught.value.fix
