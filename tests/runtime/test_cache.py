"""The cache: growing and cutting back leave what was written."""

import pytest
import torch
from torch import Tensor

from optim.runtime.cache import CHUNK, LayerCache, StaticCache, static_layers


def _cache(limit: int, transposed: bool) -> StaticCache:
    made = static_layers(2, 3, 2, 5, torch.device("cpu"), torch.float32)
    cache = StaticCache(made, limit)
    if not transposed:  # the GPU's layout, on the CPU
        empty = torch.zeros(3, 2, 0, 5)
        cache.layers = [LayerCache(False, empty, empty.clone()) for _ in range(2)]
    return cache


def _read(layer: LayerCache, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values as `[B, T, heads, D]`."""
    if layer.transposed:
        keys = layer.keys.view(3, 2, 5, -1).permute(0, 3, 1, 2)
        return keys[:, :length], layer.values.view(3, 2, -1, 5).transpose(1, 2)[:, :length]
    return layer.keys.transpose(1, 2)[:, :length], layer.values.transpose(1, 2)[:, :length]


@pytest.mark.parametrize("transposed", [True, False])
def test_what_is_written_is_read_across_growth(transposed: bool) -> None:
    cache = _cache(4 * CHUNK, transposed)
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
    cache = _cache(CHUNK + 10, transposed=True)
    assert cache.nbytes == 0
    cache.reserve(3)
    assert cache.capacity == CHUNK
    assert cache.nbytes == 2 * 2 * 3 * 2 * 5 * CHUNK * 4
    cache.reserve(CHUNK + 1)
    assert cache.capacity == CHUNK + 10


def test_truncate_only_shortens() -> None:
    cache = _cache(64, transposed=True)
    cache.length = 20
    cache.truncate(30)
    assert cache.length == 20
    cache.truncate(7)
    assert cache.length == 7


def test_an_interrupted_growth_is_repeated() -> None:
    cache = _cache(10 * CHUNK, transposed=True)
    cache.reserve(10)
    cache.layers[0].grow(8 * CHUNK)  # as if stopped before the second layer
    cache.reserve(2 * CHUNK)
    for layer in cache.layers:
        assert isinstance(layer, LayerCache)
        assert layer.keys.shape[-1] >= 2 * CHUNK
