"""One new token a row, whose place in its cache is read from the device.

The host decides where the token goes and writes four numbers. Nothing after that depends on them in
Python, so that the work can be recorded once and replayed (decoder/cuda_graph.py). Beside it stands
the attention of such a token over all that a buffer could hold, in torch: what the GPU's kernel
gives.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optim.runtime.cache.attention import Rule
from optim.runtime.cache.full import Layer, LayerCache, by_rows
from optim.runtime.cache.quantized import PackedLayer, Side, dequantize, quantize


@dataclass(frozen=True, slots=True)
class Place:
    """int64 `[4]` on the device.

    The token's position in its text, which rotates it; its slot in the buffers; `base`, how many
    positions lie in older buffers; `seen`, how many there are, the token's included.
    """

    numbers: Tensor

    @property
    def position(self) -> Tensor:
        return self.numbers[:1]

    @property
    def slot(self) -> Tensor:
        return self.numbers[1:2]

    @property
    def base(self) -> Tensor:
        return self.numbers[2:3]

    @property
    def seen(self) -> Tensor:
        return self.numbers[3:]


@dataclass(frozen=True, slots=True)
class Store:
    """Keys and values `[rows, N, D]`, or of 8 or 4 `bits` with their grids.

    `old` holds positions 0..base of a place, any other those from `base` on.
    """

    bits: int
    keys: Tensor
    values: Tensor
    key_grid: Tensor | None = None
    value_grid: Tensor | None = None
    old: bool = False

    def whole(self) -> tuple[Tensor, Tensor]:
        """Keys and values in fp32, rotated as they are."""
        if self.key_grid is None or self.value_grid is None:
            return self.keys.float(), self.values.float()
        keys = dequantize(self.keys, self.key_grid, self.bits)
        return keys, dequantize(self.values, self.value_grid, self.bits)


def prepared(layer: Layer, start: int) -> int:
    """Make room in `layer` for a token at position `start`; the base of its place.

    Raises TypeError for a layer that has no such place.
    """
    if isinstance(layer, PackedLayer):
        layer.place(start, 1)
        return layer.base
    if isinstance(layer, LayerCache) and layer.keys.dim() == 4:
        return 0
    raise TypeError(type(layer).__name__)


def buffers(layer: Layer) -> list[Tensor]:
    """Everything that a recorded step reads and writes of `layer`."""
    if isinstance(layer, LayerCache):
        return [layer.keys, layer.values]
    assert isinstance(layer, PackedLayer)
    sides = layer.keys, layer.values, layer.old_keys, layer.old_values
    return [tensor for side in sides for tensor in (side.codes, side.grid)]


def write(layer: Layer, k: Tensor, v: Tensor, place: Place) -> None:
    """Put `k`, `v` `[B, 1, kv_heads, D]` in the place's slot."""
    if isinstance(layer, LayerCache):
        for buffer, x in ((layer.keys, k), (layer.values, v)):
            buffer.index_copy_(2, place.slot, x.transpose(1, 2).to(buffer.dtype))
        return
    assert isinstance(layer, PackedLayer)
    for side, x in ((layer.keys, k), (layer.values, v)):
        codes, grid = quantize(by_rows(x).float() @ layer.rotation, side.bits)
        side.codes.index_copy_(1, place.slot, codes)
        side.grid.index_copy_(1, place.slot, grid)


def stores(layer: Layer) -> list[Store]:
    """The buffers of `layer`, the oldest first."""
    if isinstance(layer, LayerCache):
        return [Store(16, layer.keys.flatten(0, 1), layer.values.flatten(0, 1))]
    assert isinstance(layer, PackedLayer)
    recent = _packed(layer.keys, layer.values, False)
    return (
        [_packed(layer.old_keys, layer.old_values, True), recent] if layer.bits == 4 else [recent]
    )


def _packed(keys: Side, values: Side, old: bool) -> Store:
    return Store(keys.bits, keys.codes, values.codes, keys.grid, values.grid, old)


def reference(
    q: Tensor,
    stores: Sequence[Store],
    numbers: Tensor,
    rule: Rule,
    padding: Tensor | None,
    prefix: int,
) -> Tensor:
    """What `q` `[B, heads, D]`, the latest token's, sees in `stores`: the same shape.

    `numbers` are those of a Place; `padding` int64 `[B]` follows `prefix` positions.
    """
    batch, heads, dim = q.shape
    kv = stores[0].keys.shape[0] // batch
    base, seen = numbers[2], numbers[3]
    rows = q.float().reshape(batch, kv, heads // kv, dim)
    scores, values = [], []
    for store in stores:
        keys, held = (x.view(batch, kv, *x.shape[1:]) for x in store.whole())
        n = torch.arange(keys.shape[2], device=q.device) + (0 if store.old else base)
        shown = (n < (base if store.old else seen)) & (n >= seen - (rule.window or seen))
        if padding is not None:
            real = (n >= padding[:, None] + prefix) | (n < prefix) | (n == seen - 1)
            shown = (shown & real)[:, None, None]
        s = rows @ keys.transpose(2, 3) * rule.scale
        if rule.cap is not None:
            s = torch.tanh(s / rule.cap) * rule.cap
        scores.append(s.masked_fill(~shown, -torch.inf))
        values.append(held)
    out = torch.softmax(torch.cat(scores, -1), -1) @ torch.cat(values, 2)
    return out.reshape(q.shape).to(q.dtype)
