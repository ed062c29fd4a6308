"""The cache: growing and cutting back leave what was written."""

import pytest
import torch
from torch import Tensor

from optim.runtime.cache.full import CHUNK, LayerCache, StaticCache, static_layers

LAYOUTS = ["rows", "transposed", "gpu"]


def _cache(limit: int, layout: str) -> StaticCache:
    made = static_layers(2, 3, 2, 5, torch.device("cpu"), torch.float32, layout == "transposed")
    cache = StaticCache(made, limit)
    if layout == "gpu":
        empty = torch.zeros(3, 2, 0, 5)
        cache.layers = [LayerCache(False, empty, empty.clone()) for _ in range(2)]
    return cache


def _read(layer: LayerCache, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values as `[B, T, heads, D]`, from where they lie."""
    keys = layer.keys.transpose(1, 2) if layer.transposed else layer.keys
    pair = (x.reshape(3, 2, -1, 5).transpose(1, 2)[:, :length] for x in (keys, layer.values))
    return next(pair), next(pair)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_is_read_across_growth(layout: str) -> None:
    cache = _cache(4 * CHUNK, layout)
    k, v = torch.randn(2, 3, 3 * CHUNK, 2, 5)
    for start in range(0, 3 * CHUNK, 96):
        cache.reserve(start + 96)
        for sign, layer in zip((1, -1), cache.layers, strict=True):
            span = slice(start, start + 96)
            layer.write(sign * k[:, span], sign * v[:, span], start)
        cache.length = start + 96
    for sign, layer in zip((1, -1), cache.layers, strict=True):
        assert isinstance(layer, LayerCache)
        keys, values = _read(layer, 3 * CHUNK)
        assert torch.equal(keys, sign * k)
        assert torch.equal(values, sign * v)


def test_memory_follows_the_text_and_stops_at_the_limit() -> None:
    cache = _cache(CHUNK + 10, "rows")
    assert cache.nbytes == 0
    cache.reserve(3)
    assert cache.capacity == CHUNK
    assert cache.nbytes == 2 * 2 * 3 * 2 * 5 * CHUNK * 4
    cache.reserve(CHUNK + 1)
    assert cache.capacity == CHUNK + 10


def test_truncate_only_shortens() -> None:
    cache = _cache(64, "rows")
    cache.length = 20
    cache.truncate(30)
    assert cache.length == 20
    cache.truncate(7)
    assert cache.length == 7


def test_an_interrupted_growth_is_repeated() -> None:
    cache = _cache(10 * CHUNK, "rows")
    cache.reserve(10)
    cache.layers[0].grow(8 * CHUNK)  # as if stopped before the second layer
    cache.reserve(2 * CHUNK)
    for layer in cache.layers:
        assert isinstance(layer, LayerCache)
        assert layer.keys.shape[-2] >= 2 * CHUNK
