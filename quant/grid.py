"""Rounding to an integer grid: ranges to scales and zero points, weights to integers.

A weight `[out, in]` is cut along its input into groups; each (row, group) has one scale s and, when
asymmetric, one zero point z: w ~ (q - z) s with q in 0 .. 2^bits - 1. Scales are rounded to the
dtype they are stored in *before* anything is rounded with them, so what is solved is what is
stored.

In the grids of GGUF's blocks, z is no integer, or q is looked up in a codebook; scales are those
that the blocks hold (formats/block_scales.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from optim.runtime.formats import block_scales
from optim.runtime.formats.blocks import BLOCKS
from optim.runtime.formats.pack_quantized import Scheme


@dataclass(frozen=True, slots=True)
class Grid:
    """scale, zero `[out, groups]`, float32 holding values of the stored dtype.

    heads `[out, blocks, 1 or 2]`: what a K type's scales and offsets are integer multiples of.
    """

    scale: Tensor
    zero: Tensor
    scheme: Scheme
    heads: Tensor | None = None

    @property
    def top(self) -> int:
        return int(2**self.scheme.bits) - 1

    @property
    def codebook(self) -> Tensor | None:
        """What codes stand for in steps, where that is not q - z."""
        return None if self.scheme.blocks is None else BLOCKS[self.scheme.blocks].codebook

    def rows(self, rows: slice) -> "Grid":
        """That of some rows of the weight."""
        heads = None if self.heads is None else self.heads[rows]
        return Grid(self.scale[rows], self.zero[rows], self.scheme, heads)


def grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """`[out, in]` -> `[out, groups, group_size]` (a view)."""
    size = weight.shape[1] if scheme.group_size == -1 else scheme.group_size
    return weight.view(weight.shape[0], -1, size)


def spread(values: Tensor, columns: int) -> Tensor:
    """Per-group values `[out, groups]` -> per-column `[out, in]`."""
    return values.repeat_interleave(columns // values.shape[1], dim=1)


def ranges(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each (row, group), both `[out, groups]`, always around zero."""
    low, high = grouped(weight, scheme).aminmax(dim=-1)
    return low.clamp(max=0), high.clamp(min=0)


def make_grid(low: Tensor, high: Tensor, scheme: Scheme, dtype: torch.dtype) -> Grid:
    """The grid that covers low..high `[out, groups]`, its scales rounded to `dtype`.

    A group of zeros gets scale 1: nothing divides by zero and it still rounds to zero.
    """
    if scheme.blocks is not None:
        return block_grid(block_scales.cover(low, high, BLOCKS[scheme.blocks]), scheme)
    top = 2**scheme.bits - 1
    span = 2 * torch.maximum(high, -low) if scheme.symmetric else high - low
    scale = (span / top).to(dtype).float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if scheme.symmetric:
        zero = torch.full_like(scale, 2 ** (scheme.bits - 1))
    else:
        zero = (-low / scale).round().clamp(0, top)
    return Grid(scale, zero, scheme)


def block_grid(found: block_scales.Scales, scheme: Scheme) -> Grid:
    """Scales of GGUF's blocks as a grid."""
    return Grid(found.scale, found.zero, scheme, found.heads)


def round_to(weight: Tensor, grid: Grid) -> Tensor:
    """Nearest grid integers, float32 `[out, in]` with values 0 .. 2^bits - 1."""
    w = grouped(weight, grid.scheme)
    if grid.scheme.blocks is not None:
        kind, each = BLOCKS[grid.scheme.blocks], (grid.scale[..., None], grid.zero[..., None])
        return block_scales.codes_of(w, *each, kind).flatten(1)
    q = (w / grid.scale[..., None]).round_().add_(grid.zero[..., None]).clamp_(0, grid.top)
    return q.flatten(1)


def restore(q: Tensor, grid: Grid) -> Tensor:
    """Integers `[out, in]` -> the weights they stand for, float32."""
    w = grouped(q.float(), grid.scheme)
    book = grid.codebook
    steps = w - grid.zero[..., None] if book is None else book[w.long()]
    return (steps * grid.scale[..., None]).flatten(1)


def nearest(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> tuple[Tensor, Grid]:
    """Plain rounding on the min-max grid: (integers, grid)."""
    grid = make_grid(*ranges(weight, scheme), scheme, dtype)
    return round_to(weight, grid), grid
