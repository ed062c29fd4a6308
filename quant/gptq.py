"""Rounding with error feedback (GPTQ, arXiv 2210.17323; written as the LDLQ of arXiv 2307.13304).

With H = XᵀX the output error of rounding W to Q is tr(E H Eᵀ), E = W - Q. Factor the damped and
permuted H = L Lᵀ, L lower triangular: the error becomes Σ_k L_kk² |e_k + Σ_{j>k} e_j L_jk / L_kk|²,
so column k is rounded after adding what the columns after it owe:

    q_k = round(w_k + Σ_{j>k} e_j F_kj),   F = (L / diag L)ᵀ without its diagonal

One Cholesky, in the memory of H, and no inverse. Columns are ordered by rising diagonal and taken
from the last, so the most active come first ("act-order"); groups and scales are those of the
unpermuted weight, so the format needs no column index. Rows do not touch each other.
"""

from dataclasses import dataclass

import numba
import numpy as np
import torch
from torch import Tensor

from optim.quant.grid import Grid

BLOCK = 128  # columns rounded before what they owe is passed on
STRIP = 512  # columns factored at a time
TILE = 64  # rows rounded side by side: with a block's columns they stay in the nearest cache


@dataclass(frozen=True, slots=True)
class Feedback:
    """order `[in]`: the permutation; damping: as used; and two matrices `[in, in]` in one.

    The strict upper triangle of `factor` is F; the strict lower one and `diagonal` `[in]` are the
    damped and permuted Gram matrix.
    """

    order: Tensor
    factor: Tensor
    diagonal: Tensor
    damping: float

    def gram(self) -> Tensor:
        """The damped Gram matrix `[in, in]`, in the memory of the factor, which is gone then."""
        gram = self.factor.mT
        for start in range(0, len(gram), STRIP):
            part, after = slice(start, start + STRIP), slice(start + STRIP, None)
            upper = gram[part, part].triu(1)
            gram[part, part] = upper + upper.T + torch.diag(self.diagonal[part])
            gram[after, part] = gram[part, after].T
        _permute(gram, self.order.argsort().tolist())
        return gram


def feedback(gram: Tensor, damping: float) -> Feedback:
    """The feedback of a Gram matrix `[in, in]` fp32, whose memory it takes over.

    `damping` is a share of the mean diagonal; it is raised tenfold until the factor exists (too
    few tokens for the width). Channels that were never active round plainly.
    """
    diagonal = gram.diagonal().clone()
    order = diagonal.argsort()
    _permute(gram, order.tolist())
    diagonal = diagonal[order]
    mean = diagonal.mean().clamp(min=1e-20)
    while not _factor(gram, diagonal + damping * mean):
        damping *= 10
    for start in range(0, len(gram), STRIP):
        part, after = slice(start, start + STRIP), slice(start + STRIP, None)
        corner, size = gram[part, part], gram.diagonal()[part].clone()
        corner.copy_(corner.triu(1) + corner.tril(-1) / size)
        gram[after, part] /= size
    return Feedback(order, gram.mT, diagonal + damping * mean, damping)


def _permute(gram: Tensor, order: list[int]) -> None:
    """gram[order][:, order] in place: columns a strip at a time, rows along each cycle."""
    for strip in torch.split(gram, BLOCK):
        strip.copy_(strip[:, order])
    left = set(range(len(order)))
    while left:
        first = at = left.pop()
        kept = gram[first].clone()
        while order[at] != first:
            gram[at] = gram[order[at]]
            at = order[at]
            left.remove(at)
        gram[at] = kept


def _factor(h: Tensor, diagonal: Tensor) -> bool:
    """Cholesky of h with this diagonal into its lower triangle; the upper one keeps h.

    False where h is not positive definite; h can then be tried again.
    """
    for start in range(0, len(h), STRIP):
        part, after = slice(start, start + STRIP), slice(start + STRIP, None)
        done, upper = h[part, :start], h[part, part].triu(1)
        corner = upper + upper.T + torch.diag(diagonal[part]) - done @ done.T
        corner, info = torch.linalg.cholesky_ex(corner)
        if int(info) != 0:
            return False
        below = torch.addmm(h[part, after].T, h[after, :start], done.T, alpha=-1)
        h[after, part] = torch.linalg.solve_triangular(corner.T, below, upper=True, left=False)
        h[part, part] = corner + upper
    return True


def round_with_feedback(weight: Tensor, grid: Grid, fed: Feedback) -> Tensor:
    """Integers for rows of a weight `[rows, in]` on their grid, float32 `[rows, in]`."""
    columns = weight.shape[1]
    group = torch.arange(columns, device=weight.device) // (columns // grid.scale.shape[1])
    # Transposed: a column's rows lie side by side, and they are rounded side by side.
    w = weight.T[fed.order]
    scale, zero = grid.scale.T[group[fed.order]], grid.zero.T[group[fed.order]]
    error, q = torch.zeros_like(w), torch.empty_like(w)
    for start in reversed(range(0, columns, BLOCK)):
        part, after = slice(start, start + BLOCK), slice(start + BLOCK, None)
        target = torch.addmm(w[part], fed.factor[part, after], error[after])
        block = (target, w[part], scale[part], zero[part], fed.factor[part, part])
        q[part], error[part] = _round_block(*block, float(grid.top), grid.codebook)
    out = torch.empty_like(weight)
    out[:, fed.order] = q.T
    return out


def _round_block(
    target: Tensor,
    w: Tensor,
    scale: Tensor,
    zero: Tensor,
    factor: Tensor,
    top: float,
    book: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if w.device.type == "cpu":
        arrays = [t.contiguous().numpy() for t in (target, w, scale, zero, factor)]
        if book is None:
            q, error = _round_tiles(*arrays, np.float32(top))  # type: ignore[call-arg]
        else:
            del arrays[3]
            q, error = _look_up_tiles(*arrays, book.numpy())  # type: ignore[call-arg]
        return torch.from_numpy(q), torch.from_numpy(error)
    return round_block_reference(target, w, scale, zero, factor, top, book)


def round_block_reference(
    target: Tensor,
    w: Tensor,
    scale: Tensor,
    zero: Tensor,
    factor: Tensor,
    top: float,
    book: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Columns from the last: (integers, errors) `[b, rows]`.

    target `[b, rows]` is the weight plus what later blocks owe; factor `[b, b]` as in `Feedback`.
    With a codebook, integers are places in it, and there are no zero points.
    """
    target, q, error = target.clone(), torch.empty_like(w), torch.empty_like(w)
    for k in reversed(range(len(w))):
        if book is None:
            q[k] = (target[k] / scale[k] + zero[k]).round().clamp(0, top)
            steps = q[k] - zero[k]
        else:
            q[k] = torch.bucketize(target[k] / scale[k], (book[1:] + book[:-1]) / 2)
            steps = book[q[k].long()]
        error[k] = w[k] - steps * scale[k]
        target[:k] += factor[:k, k : k + 1] * error[k]
    return q, error


@numba.njit(parallel=True, fastmath=True, cache=True)
def _round_tiles(target, w, scale, zero, factor, top):  # type: ignore[no-untyped-def]
    columns, rows = w.shape
    q = np.empty_like(w)
    error = np.empty_like(w)
    for tile in numba.prange((rows + TILE - 1) // TILE):
        first = tile * TILE
        here = min(TILE, rows - first)
        value = target[:, first : first + here].copy()
        for k in range(columns - 1, -1, -1):
            for r in range(here):
                s, z = scale[k, first + r], zero[k, first + r]
                level = min(max(np.rint(value[k, r] / s + z), np.float32(0)), top)
                q[k, first + r] = level
                error[k, first + r] = w[k, first + r] - (level - z) * s
            owed = error[k, first : first + here]
            for j in range(k):
                for r in range(here):
                    value[j, r] += owed[r] * factor[j, k]
    return q, error


@numba.njit(parallel=True, fastmath=True, cache=True)
def _look_up_tiles(target, w, scale, factor, book):  # type: ignore[no-untyped-def]
    columns, rows = w.shape
    q = np.empty_like(w)
    error = np.empty_like(w)
    middles = (book[1:] + book[:-1]) / np.float32(2)
    for tile in numba.prange((rows + TILE - 1) // TILE):
        first = tile * TILE
        here = min(TILE, rows - first)
        value = target[:, first : first + here].copy()
        for k in range(columns - 1, -1, -1):
            for r in range(here):
                x, place = value[k, r] / scale[k, first + r], 0
                for middle in middles:
                    place += x > middle
                q[k, first + r] = place
                error[k, first + r] = w[k, first + r] - book[place] * scale[k, first + r]
            owed = error[k, first : first + here]
            for j in range(k):
                for r in range(here):
                    value[j, r] += owed[r] * factor[j, k]
    return q, error
