"""The key/value cache: one pair of buffers a layer, grown in chunks, cut back at will.

On a CPU, keys lie transposed (`[B * kv_heads, D, N]`, fp32), so that a query row times all keys is
one plain matrix product. On a GPU both lie `[B, kv_heads, N, D]`, as fused attention wants them.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

CHUNK = 128  # positions a buffer grows by, at least


class Cache(Protocol):
    """What generation knows of a cache: how much it holds, may hold, and how to cut it back."""

    length: int
    limit: int

    def truncate(self, length: int) -> None: ...

    @property
    def nbytes(self) -> int: ...


@dataclass(slots=True)
class LayerCache:
    """Keys and values of one layer; `read(n)` gives views of the first n positions."""

    transposed: bool
    keys: Tensor
    values: Tensor

    def write(self, k: Tensor, v: Tensor, start: int) -> None:
        """Put `k`, `v` `[B, T, kv_heads, D]` at positions start..start+T."""
        b, t, h, d = k.shape
        end = start + t
        if self.transposed:
            self.keys.view(b, h, d, -1)[..., start:end].copy_(k.permute(0, 2, 3, 1))
            self.values.view(b, h, -1, d)[:, :, start:end].copy_(v.transpose(1, 2))
        else:
            self.keys[:, :, start:end].copy_(k.transpose(1, 2))
            self.values[:, :, start:end].copy_(v.transpose(1, 2))

    def grow(self, length: int) -> None:
        """Make room for `length` positions, keeping what is there."""
        self.keys = _longer(self.keys, -1 if self.transposed else -2, length)
        self.values = _longer(self.values, -2, length)


def _longer(old: Tensor, dim: int, length: int) -> Tensor:
    size = list(old.shape)
    kept = size[dim]
    if kept >= length:
        return old  # a growth that was interrupted
    size[dim] = length
    new = old.new_zeros(size)
    new.narrow(dim, 0, kept).copy_(old)
    return new


@dataclass(slots=True)
class StaticCache:
    """All layers' keys and values for `batch` rows, at most `limit` positions.

    `length` positions are filled. `padding` `[B]` counts the pad tokens on the left of each row.
    """

    layers: list[LayerCache]
    limit: int
    length: int = 0
    padding: Tensor | None = None
    capacity: int = field(default=0)

    def reserve(self, length: int) -> None:
        """Grow every layer so that `length` positions fit."""
        if length <= self.capacity:
            return
        wanted = max(length, self.capacity + self.capacity // 2)
        capacity = min(self.limit, -(-wanted // CHUNK) * CHUNK)
        for layer in self.layers:
            layer.grow(capacity)
        self.capacity = capacity

    def truncate(self, length: int) -> None:
        """Forget everything from position `length` on."""
        self.length = min(self.length, length)

    @property
    def nbytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)


def static_cache(
    *,
    layers: int,
    batch: int,
    kv_heads: int,
    head_dim: int,
    limit: int,
    device: torch.device,
    dtype: torch.dtype,
    padding: Tensor | None = None,
) -> StaticCache:
    """An empty cache; memory is taken as the text grows."""
    transposed = device.type == "cpu"

    def empty() -> LayerCache:
        if transposed:
            k = torch.zeros(batch * kv_heads, head_dim, 0, dtype=dtype, device=device)
            return LayerCache(True, k, k.new_zeros(batch * kv_heads, 0, head_dim))
        k = torch.zeros(batch, kv_heads, 0, head_dim, dtype=dtype, device=device)
        return LayerCache(False, k, k.clone())

    return StaticCache([empty() for _ in range(layers)], limit, padding=padding)
