"""A KV cache of 8 or 4 bits a value, which attention reads as it is stored.

A key or value vector x `[D]` of one head and token is rotated by H (a blockwise Hadamard matrix,
orthogonal and symmetric), then rounded on a grid of its own:

    y = H x;  low = min(y);  step = (max(y) - low) / (2^bits - 1);  code = round((y - low) / step)

Rotation spreads the few large channels of keys over all of them (QuaRot, arXiv 2404.00456, 4.3).
As H is orthogonal, q . k = (H q) . (H k): queries are rotated too, and the mixed values back. With
q' = H q, a score is step * (q' . codes) + low * sum(q'), so that no key is ever made whole.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.cache import Layer, by_rows, longer

TILE = 512  # positions whose codes are spread to floats at a time


def hadamard_block(dim: int) -> int:
    """The largest power of two that divides `dim`."""
    return dim & -dim


@cache
def hadamard(dim: int, device: torch.device) -> Tensor:
    """The orthogonal, symmetric `[dim, dim]` of Hadamard blocks (Sylvester's) on the diagonal."""
    block = torch.ones(1, 1)
    while block.shape[0] < hadamard_block(dim):
        block = torch.cat((torch.cat((block, block), 1), torch.cat((block, -block), 1)))
    block = block / block.shape[0] ** 0.5
    return torch.kron(torch.eye(dim // block.shape[0]), block).to(device)


def quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 `[..., D * bits / 8]` and grids bf16 `[..., 2]` (step, low) of fp32 `[..., D]`.

    At 4 bits, byte i holds code i in its low half and code i + D/2 in its high half.
    """
    top = 2**bits - 1
    low = x.amin(-1, keepdim=True).bfloat16().float()
    step = ((x.amax(-1, keepdim=True) - low) / top).bfloat16().float()
    step = torch.where(step > 0, step, 1.0)
    codes = ((x - low) / step).round_().clamp_(0, top).to(torch.uint8)
    if bits == 4:
        first, second = codes.chunk(2, -1)
        codes = first | second << 4
    return codes, torch.cat((step, low), -1).bfloat16()


def spread(codes: Tensor, bits: int) -> Tensor:
    """Codes as fp32 `[..., D]`, one a value."""
    if bits == 4:
        codes = torch.cat((codes & 15, codes >> 4), -1)
    return codes.float()


def dequantize(codes: Tensor, grid: Tensor, bits: int) -> Tensor:
    """The fp32 `[..., D]` that `quantize` stored."""
    step, low = grid.float().chunk(2, -1)
    return spread(codes, bits) * step + low


@dataclass(slots=True)
class PackedLayer:
    """Rotated, rounded keys and values `[B * kv, N, D * bits / 8]`, grids `[B * kv, N, 2]`."""

    bits: int
    rotation: Tensor
    keys: Tensor
    key_grid: Tensor
    values: Tensor
    value_grid: Tensor

    @property
    def rows(self) -> int:
        return self.keys.shape[0]

    def write(self, k: Tensor, v: Tensor, start: int) -> None:
        self.put_keys(by_rows(k), start)
        rows = by_rows(v).float() @ self.rotation
        self._put(rows, start, self.values, self.value_grid)

    def put_keys(self, rows: Tensor, start: int) -> None:
        self._put(rows.float() @ self.rotation, start, self.keys, self.key_grid)

    def _put(self, rows: Tensor, start: int, codes: Tensor, grid: Tensor) -> None:
        span = slice(start, start + rows.shape[1])
        codes[:, span], grid[:, span] = quantize(rows, self.bits)

    def keys_at(self, first: int, end: int) -> Tensor:
        span = slice(first, end)
        return dequantize(self.keys[:, span], self.key_grid[:, span], self.bits) @ self.rotation

    def scores(self, rows: Tensor, first: int, end: int, scale: float) -> Tensor:
        q = (rows.float() @ self.rotation) * scale
        total = q.sum(-1, keepdim=True)
        tiles = []
        for at in range(first, end, TILE):
            span = slice(at, min(at + TILE, end))
            step, low = self.key_grid[:, span].float().transpose(1, 2).chunk(2, 1)
            codes = spread(self.keys[:, span], self.bits)
            tiles.append(torch.bmm(q, codes.transpose(1, 2)).mul_(step).add_(total * low))
        return tiles[0] if len(tiles) == 1 else torch.cat(tiles, -1)

    def mix(self, weights: Tensor, first: int, end: int) -> Tensor:
        out = self.rotation.new_zeros(())
        for at in range(first, end, TILE):
            span = slice(at, min(at + TILE, end))
            step, low = self.value_grid[:, span].float().transpose(1, 2).chunk(2, 1)
            w = weights[..., at - first : span.stop - first].float()
            codes = spread(self.values[:, span], self.bits)
            out = out + torch.bmm(w * step, codes) + (w * low).sum(-1, keepdim=True)
        return out @ self.rotation

    def grow(self, length: int) -> None:
        self.keys, self.key_grid = longer(self.keys, 1, length), longer(self.key_grid, 1, length)
        self.values = longer(self.values, 1, length)
        self.value_grid = longer(self.value_grid, 1, length)

    def buffers(self) -> list[tuple[Tensor, int]]:
        return [(x, 1) for x in (self.keys, self.key_grid, self.values, self.value_grid)]


def packed_layers(
    count: int, batch: int, kv_heads: int, head_dim: int, device: torch.device, bits: int
) -> list[Layer]:
    """Empty layers of `bits` 8 or 4. OptimError (2) for 4 bits and an odd head."""
    if head_dim % 2 and bits == 4:
        raise OptimError(f"4 bits need an even head size, not {head_dim}", "--kv-bits 8", USAGE)
    rotation = hadamard(head_dim, device)

    def empty() -> PackedLayer:
        codes = torch.zeros(
            batch * kv_heads, 0, head_dim * bits // 8, dtype=torch.uint8, device=device
        )
        grid = torch.zeros(batch * kv_heads, 0, 2, dtype=torch.bfloat16, device=device)
        return PackedLayer(bits, rotation, codes, grid, codes.clone(), grid.clone())

    return [empty() for _ in range(count)]
