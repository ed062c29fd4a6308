"""AWQ: scale the input channels that matter before rounding, then clip each group's range.

Activation-aware weight quantization (arXiv 2306.00978). A channel scaled up by s is rounded more
finely; the tensor it reads is divided by s in the module before. Both searches minimise the output
error of the linears themselves, tr(E H Eᵀ) with E the rounding error and H = XᵀX, so one Gram
matrix stands for every calibration token and a grid point costs the same for 1k and for 1M tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from optim.quant.grid import Grid, block_grid, grouped, make_grid, nearest, ranges, restore
from optim.runtime.formats import block_scales
from optim.runtime.formats.blocks import BLOCKS
from optim.runtime.formats.pack_quantized import Scheme

SEARCH_WORK = 2**26  # rows x in^2: the scale search measures on evenly spaced rows of a linear
LEAST_ROWS, MOST_ROWS = 64, 256
FLOOR = 1e-4


@dataclass(frozen=True, slots=True)
class Reader:
    """One linear of a fold group: weight `[rows, in]` fp32, its input's gram `[in, in]`."""

    weight: Tensor
    gram: Tensor
    scheme: Scheme


def sampled_rows(rows: int, columns: int) -> slice:
    """The evenly spaced rows of a weight `[rows, columns]` that the scale search looks at."""
    wanted = min(MOST_ROWS, max(LEAST_ROWS, SEARCH_WORK // columns**2))
    return slice(0, rows, max(1, rows // wanted))


def search_scale(
    readers: list[Reader],
    magnitude: Tensor,
    *,
    n_grid: int,
    forms: tuple[bool, ...],
    repeats: tuple[int, int] | None,
    dtype: torch.dtype,
) -> Tensor:
    """The input scale `[in]` with the least summed output error; ones if nothing beats them.

    `magnitude` `[in]` is the mean |x| of the inputs. `forms` holds False for s = x^r and True for
    s = x^r / w^(1-r) ("duo scaling"). With `repeats` = (query heads a KV head, head dim) the scale
    is made equal over the query heads that share a KV head.
    """
    x = magnitude.clamp(min=FLOOR)
    w = torch.cat([_relative(r) for r in readers]).mean(0)
    best = torch.ones_like(magnitude)
    best_loss = _loss(readers, best, dtype)

    def scale_at(i: int, duo: bool) -> Tensor:
        scale = _candidate(x, w, i / n_grid, duo)
        return scale if repeats is None else share_heads(scale, *repeats)

    def loss_at(i: int, duo: bool) -> float:
        return _loss(readers, scale_at(i, duo), dtype)

    for duo in forms:
        found, loss = _search_ratio(partial(loss_at, duo=duo), n_grid)
        if loss < best_loss:
            best, best_loss = scale_at(found, duo), loss
    return best


def _search_ratio(loss_at: Callable[[int], float], n_grid: int) -> tuple[int, float]:
    """The best point of 0 .. n_grid and its loss: every fourth one, then closer around the best."""
    losses = {i: loss_at(i) for i in range(0, n_grid + 1, 4)}
    for step in (2, 1):
        found = min(losses, key=losses.__getitem__)
        near = (i for i in (found - step, found + step) if 0 <= i <= n_grid)
        losses |= {i: loss_at(i) for i in near if i not in losses}
    found = min(losses, key=losses.__getitem__)
    return found, losses[found]


def share_heads(scale: Tensor, queries: int, head_dim: int) -> Tensor:
    """Average `[kv * queries * head_dim]` over the query heads of each KV head, and repeat it."""
    heads = scale.view(-1, queries, head_dim)
    return heads.mean(1, keepdim=True).expand_as(heads).reshape(-1)


def _candidate(x: Tensor, w: Tensor, ratio: float, duo: bool) -> Tensor:
    scale = x**ratio
    if duo:
        scale = scale / (w ** (1 - ratio) + FLOOR)
    scale = scale.clamp(min=FLOOR)
    scale = scale / (scale.max() * scale.min()).sqrt()
    return torch.where(scale.isfinite(), scale, torch.ones_like(scale))


def _relative(reader: Reader) -> Tensor:
    """|w| over the largest |w| of its group: how much of the grid each channel uses."""
    w = grouped(reader.weight, reader.scheme).abs()
    return (w / (w.amax(-1, keepdim=True) + 1e-6)).flatten(1)


def _loss(readers: list[Reader], scale: Tensor, dtype: torch.dtype) -> float:
    total = 0.0
    for reader in readers:
        q, grid = nearest(reader.weight * scale, reader.scheme, dtype)
        error = restore(q, grid).div_(scale).sub_(reader.weight)
        total += float(((error @ reader.gram) * error).sum())
    return total


SHRINKS = tuple(1 - i / 20 for i in range(10))


def search_clip(weight: Tensor, blocks: Tensor, scheme: Scheme, dtype: torch.dtype) -> Grid:
    """The grid of each (row, group) of `weight` `[out, in]` with the least output error.

    Groups are taken apart: the error of a group is e H_gg eᵀ with H_gg its diagonal block, one of
    `blocks` `[groups, size, size]`. First
    both ends are shrunk together, then each end alone around the best.
    """
    if scheme.blocks is not None:
        return block_grid(block_scales.fit(weight, BLOCKS[scheme.blocks], blocks), scheme)
    low, high = ranges(weight, scheme)
    best_loss = torch.full_like(low, float("inf"))
    best_low, best_high = low.clone(), high.clone()

    def attempt(a: Tensor, b: Tensor) -> None:
        loss = _group_loss(weight, make_grid(a, b, scheme, dtype), blocks)
        better = loss < best_loss
        best_loss.copy_(torch.where(better, loss, best_loss))
        best_low.copy_(torch.where(better, a, best_low))
        best_high.copy_(torch.where(better, b, best_high))

    for shrink in SHRINKS:
        attempt(low * shrink, high * shrink)
    if not scheme.symmetric:
        for shrink in (0.95, 0.9, 0.85, 0.8):
            a, b = best_low.clone(), best_high.clone()
            attempt(a * shrink, b)
            attempt(a, b * shrink)
    return make_grid(best_low, best_high, scheme, dtype)


def diagonal_blocks(gram: Tensor, scheme: Scheme) -> Tensor:
    """The part of a Gram matrix `[in, in]` that each group sees: `[groups, size, size]`."""
    size = gram.shape[0] // scheme.groups(gram.shape[0])
    return torch.stack([gram[i : i + size, i : i + size] for i in range(0, gram.shape[0], size)])


def _group_loss(weight: Tensor, grid: Grid, blocks: Tensor) -> Tensor:
    w = grouped(weight, grid.scheme)
    scale, zero = grid.scale[..., None], grid.zero[..., None]
    q = (w / scale).round_().add_(zero).clamp_(0, grid.top)
    error = q.sub_(zero).mul_(scale).sub_(w).transpose(0, 1)
    return ((error @ blocks) * error).sum(-1).transpose(0, 1)
