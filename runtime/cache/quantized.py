"""A KV cache of 8 or 4 bits a value, which attention reads as it is stored.

A key or value vector x `[D]` of one head and token is rotated by H (a blockwise Hadamard matrix,
orthogonal and symmetric), then rounded on a grid of its own:

    y = H x;  low = min(y);  step = (max(y) - low) / (2^bits - 1);  code = round((y - low) / step)

Rotation spreads the few large channels of keys over all of them (QuaRot, arXiv 2404.00456, 4.3).
As H is orthogonal, q . k = (H q) . (H k): queries are rotated too, and the mixed values back. With
q' = H q, a score is step * (q' . codes) + low * sum(q'), so that no key is ever made whole.

At 4 bits, the latest tokens, which get most of the attention, wait at 8 bits (KIVI, arXiv
2402.02750, keeps them in floats): at least RECENT of them, RECENT more at most between steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.cache.full import Layer, by_rows, longer

TILE = 512  # positions whose codes are spread to floats at a time
RECENT = 64


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
class Side:
    """Keys, or values, rotated: codes `[B * kv, N, D * bits / 8]` and grids `[B * kv, N, 2]`."""

    bits: int
    codes: Tensor
    grid: Tensor

    def put(self, rows: Tensor, start: int) -> None:
        """Store rotated `rows` `[B * kv, n, D]` from `start` on."""
        span = slice(start, start + rows.shape[1])
        self.codes[:, span], self.grid[:, span] = quantize(rows, self.bits)

    def get(self, first: int, end: int) -> Tensor:
        """What was put: fp32 `[B * kv, n, D]`."""
        return dequantize(self.codes[:, first:end], self.grid[:, first:end], self.bits)

    def grow(self, length: int) -> None:
        self.codes, self.grid = longer(self.codes, 1, length), longer(self.grid, 1, length)

    def drop(self, first: int, count: int, end: int) -> None:
        """Move what follows the `count` positions from `first` on, up to `end`, down on them."""
        for x in (self.codes, self.grid):
            x[:, first : end - count] = x[:, first + count : end].clone()

    def tiles(self, first: int, end: int) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Tile by tile: its place after `first`, codes `[B * kv, n, D]`, step and low `[.., n]`."""
        for at in range(first, end, TILE):
            span = slice(at, min(at + TILE, end))
            step, low = self.grid[:, span].float().transpose(1, 2).chunk(2, 1)
            place = slice(span.start - first, span.stop - first)
            yield place, spread(self.codes[:, span], self.bits), step, low

    def scores(self, q: Tensor, first: int, end: int) -> list[Tensor]:
        """Rotated `q` `[B * kv, R, D]` times these keys, in tiles `[B * kv, R, n]`."""
        total = q.sum(-1, keepdim=True)
        return [
            torch.bmm(q, codes.transpose(1, 2)).mul_(step).add_(total * low)
            for _, codes, step, low in self.tiles(first, end)
        ]

    def mix(self, weights: Tensor, first: int, end: int) -> Tensor:
        """These values, rotated, weighted by `[B * kv, R, n]`: `[B * kv, R, D]`."""
        dim = self.codes.shape[-1] * 8 // self.bits
        out = weights.new_zeros(*weights.shape[:2], dim)
        for place, codes, step, low in self.tiles(first, end):
            w = weights[..., place]
            out += torch.bmm(w * step, codes) + (w * low).sum(-1, keepdim=True)
        return out

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.grid.nbytes


def side(bits: int, rows: int, dim: int, length: int, device: torch.device) -> Side:
    """Room for `length` positions, zeroed."""
    codes = torch.zeros(rows, length, dim * bits // 8, dtype=torch.uint8, device=device)
    return Side(bits, codes, codes.new_zeros(rows, length, 2, dtype=torch.bfloat16))


@dataclass(slots=True)
class PackedLayer:
    """Positions 0..base at 4 bits, if any, and those from `base` on at 8."""

    bits: int
    rotation: Tensor
    old_keys: Side
    old_values: Side
    keys: Side
    values: Side
    base: int = 0

    @property
    def rows(self) -> int:
        return self.keys.codes.shape[0]

    def write(self, k: Tensor, v: Tensor, start: int) -> None:
        self.place(start, k.shape[1])
        self.keys.put(by_rows(k).float() @ self.rotation, start - self.base)
        self.values.put(by_rows(v).float() @ self.rotation, start - self.base)

    def place(self, start: int, count: int) -> None:
        """Make room for `count` recent positions from `start` on."""
        self.base = min(self.base, start)  # lower: what follows has been cut off
        if self.bits == 4 and start - self.base + count > self.keys.codes.shape[1]:
            self._age(max(self.base, start - RECENT))
            room = max(2 * RECENT, start - self.base + count)
            self.keys, self.values = (_resized(x, room) for x in (self.keys, self.values))

    def free(self, start: int) -> int:
        self.place(start, 1)
        return self.keys.codes.shape[1] - (start - self.base)

    def _age(self, base: int) -> None:
        """Positions below `base` become old."""
        count, held = base - self.base, self.keys.codes.shape[1]
        for recent, old in ((self.keys, self.old_keys), (self.values, self.old_values)):
            old.put(recent.get(0, count), self.base)
            recent.drop(0, count, held)
        self.base = base

    def put_keys(self, rows: Tensor, start: int) -> None:
        self._whole(start + rows.shape[1]).put(rows.float() @ self.rotation, start)

    def keys_at(self, first: int, end: int) -> Tensor:
        return self._whole(end).get(first, end) @ self.rotation

    def _whole(self, end: int) -> Side:
        """The side that has all keys up to `end`, after ageing some if need be."""
        if self.bits == 8:
            return self.keys
        self._age(max(self.base, end))
        return self.old_keys

    def scores(self, rows: Tensor, first: int, end: int, scale: float) -> Tensor:
        q, base = (rows.float() @ self.rotation) * scale, self.base
        old = self.old_keys.scores(q, first, base)
        tiles = old + self.keys.scores(q, max(first - base, 0), end - base)
        return tiles[0] if len(tiles) == 1 else torch.cat(tiles, -1)

    def mix(self, weights: Tensor, first: int, end: int) -> Tensor:
        w, base = weights.float(), self.base
        split = max(base - first, 0)
        out = self.values.mix(w[..., split:], max(first - base, 0), end - base)
        if split:
            out += self.old_values.mix(w[..., :split], first, base)
        return out @ self.rotation

    def grow(self, length: int) -> None:
        for x in (self.keys, self.values) if self.bits == 8 else (self.old_keys, self.old_values):
            x.grow(length)

    def drop(self, first: int, count: int, end: int) -> None:
        if self.bits == 8:
            sides, end = (self.keys, self.values), end
        else:
            self._age(max(self.base, first + count))
            sides, end = (self.old_keys, self.old_values), self.base
            self.base -= count
        for x in sides:
            x.drop(first, count, end)

    def whole(self, end: int) -> tuple[Tensor, Tensor]:
        """All keys and values up to `end`, spread and turned back: fp32 `[B * kv, n, D]`."""
        old, new = self.base, end - self.base
        pairs = (self.old_keys, self.keys), (self.old_values, self.values)
        keys, values = (
            torch.cat((a.get(0, old), b.get(0, new)), 1) @ self.rotation for a, b in pairs
        )
        return keys, values

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.old_keys, self.old_values, self.keys, self.values))

    @property
    def identity(self) -> str:
        return f"{self.bits} bits"

    def state(self, length: int) -> dict[str, Tensor]:
        base = min(self.base, length)
        recent = slice(0, length - base)
        parts = {"keys": self.keys, "values": self.values}
        old = {"old_keys": self.old_keys, "old_values": self.old_values} if self.bits == 4 else {}
        spans = dict.fromkeys(parts, recent) | dict.fromkeys(old, slice(0, base))
        return {
            f"{name}.{kind}": tensor[:, spans[name]].contiguous()
            for name, x in (parts | old).items()
            for kind, tensor in (("codes", x.codes), ("grid", x.grid))
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        self.keys, self.values = (
            Side(8, state[f"{n}.codes"], state[f"{n}.grid"]) for n in ("keys", "values")
        )
        if self.bits == 4:
            self.base = state["old_keys.codes"].shape[1]
            for name, x in (("old_keys", self.old_keys), ("old_values", self.old_values)):
                x.grow(self.base)
                x.codes[:, : self.base] = state[f"{name}.codes"]
                x.grid[:, : self.base] = state[f"{name}.grid"]


def _resized(x: Side, length: int) -> Side:
    """`x` with exactly `length` positions, as many as fit kept."""
    if x.codes.shape[1] == length:
        return x  # where it was: a recorded step looks there
    kept = min(length, x.codes.shape[1])
    dim = x.codes.shape[-1] * 8 // x.bits
    new = side(x.bits, x.codes.shape[0], dim, length, x.codes.device)
    new.codes[:, :kept], new.grid[:, :kept] = x.codes[:, :kept], x.grid[:, :kept]
    return new


def packed_layers(
    count: int, batch: int, kv_heads: int, head_dim: int, device: torch.device, bits: int
) -> list[Layer]:
    """Empty layers of `bits` 8 or 4. OptimError (2) for 4 bits and an odd head."""
    if head_dim % 2 and bits == 4:
        raise OptimError(f"4 bits need an even head size, not {head_dim}", "--kv-bits 8", USAGE)
    rows, rotation = batch * kv_heads, hadamard(head_dim, device)

    def empty() -> PackedLayer:
        old = [side(4, rows, head_dim - head_dim % 2, 0, device) for _ in range(2)]
        recent = [side(8, rows, head_dim, 0, device) for _ in range(2)]
        return PackedLayer(bits, rotation, old[0], old[1], recent[0], recent[1])

    return [empty() for _ in range(count)]
