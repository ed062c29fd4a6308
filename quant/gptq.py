"""Rounding with error feedback (GPTQ, arXiv 2210.17323; written as the LDLQ of arXiv 2307.13304).

With H = XᵀX the output error of rounding W to Q is tr((W-Q) H (W-Q)ᵀ). Factor the damped, permuted
H = R Rᵀ with R upper triangular: the error becomes Σ_k R_kk² |e_k + Σ_{j<k} e_j R_jk / R_kk|², so
column k is rounded after adding what the columns before it owe:

    q_k = round(w_k + Σ_{j<k} e_j U_jk),   U = R / diag(R),   e = w - q

One Cholesky, no inverse. Columns go in order of falling diagonal ("act-order"): the groups and
their scales are those of the unpermuted weight, so the format needs no column index. The columns of
one row depend on that row alone, so rows run in parallel.
"""

import numba
import numpy as np
import torch
from torch import Tensor

from optim.quant.grid import Grid, restore, round_to

BLOCK = 128


def feedback(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(order `[in]`, unit upper triangular U `[in, in]` with zero diagonal) of a Gram matrix.

    Channels that were never active round plainly. Damping (a share of the mean diagonal) is raised
    tenfold until the factorisation exists.
    """
    diagonal = gram.diagonal()
    mean = diagonal.mean().clamp(min=1e-20)
    order = diagonal.argsort(descending=True)
    backwards = order.flip(0)
    h = gram[backwards][:, backwards]
    h.diagonal().add_(damping * mean)
    lower, info = torch.linalg.cholesky_ex(h)
    while int(info) != 0:
        h.diagonal().add_(9 * damping * mean)
        damping *= 10
        lower, info = torch.linalg.cholesky_ex(h)
    upper = lower.flip(0, 1)  # reversed lower factor of the reversed matrix: H = R Rᵀ
    upper /= upper.diagonal().clone()
    return order, upper.triu_(1)


def round_with_feedback(weight: Tensor, grid: Grid, order: Tensor, upper: Tensor) -> Tensor:
    """Integers for `weight` `[out, in]` on a fixed grid, float32 `[out, in]`."""
    columns = weight.shape[1]
    group = torch.arange(columns, device=weight.device) // (columns // grid.scale.shape[1])
    w = weight[:, order].contiguous()
    scale = grid.scale[:, group[order]].contiguous()
    zero = grid.zero[:, group[order]].contiguous()
    error = torch.zeros_like(w)
    q = torch.empty_like(w)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        part = slice(start, end)
        owed = error[:, :start] @ upper[:start, part]
        args = (w[:, part] + owed, w[:, part], scale[:, part], zero[:, part], upper[part, part])
        q[:, part], error[:, part] = _round_block(*args, top=float(grid.top))
    out = torch.empty_like(q)
    out[:, order] = q
    return out


def _round_block(
    target: Tensor, w: Tensor, scale: Tensor, zero: Tensor, upper: Tensor, top: float
) -> tuple[Tensor, Tensor]:
    if w.device.type == "cpu":
        arrays = (t.contiguous().numpy() for t in (target, w, scale, zero, upper.T))
        q, error = _round_rows(*arrays, np.float32(top))  # type: ignore[call-arg]
        return torch.from_numpy(q), torch.from_numpy(error)
    return round_block_reference(target, w, scale, zero, upper, top)


def round_block_reference(
    target: Tensor, w: Tensor, scale: Tensor, zero: Tensor, upper: Tensor, top: float
) -> tuple[Tensor, Tensor]:
    """Columns left to right: target `[out, b]` already has what earlier blocks owe."""
    target, q, error = target.clone(), torch.empty_like(w), torch.empty_like(w)
    for k in range(w.shape[1]):
        q[:, k] = (target[:, k] / scale[:, k] + zero[:, k]).round().clamp(0, top)
        error[:, k] = w[:, k] - (q[:, k] - zero[:, k]) * scale[:, k]
        target[:, k + 1 :] += error[:, k : k + 1] * upper[k, k + 1 :]
    return q, error


@numba.njit(parallel=True, fastmath=True, cache=True)
def _round_rows(target, w, scale, zero, lower, top):  # type: ignore[no-untyped-def]
    rows, columns = w.shape
    q = np.empty_like(w)
    error = np.empty_like(w)
    for r in numba.prange(rows):
        for k in range(columns):
            value = target[r, k]
            for j in range(k):
                value += error[r, j] * lower[k, j]
            level = np.rint(value / scale[r, k] + zero[r, k])
            level = min(max(level, np.float32(0)), top)
            q[r, k] = level
            error[r, k] = w[r, k] - (level - zero[r, k]) * scale[r, k]
    return q, error


def row_error(weight: Tensor, q: Tensor, grid: Grid, gram: Tensor) -> Tensor:
    """diag((W-Q) H (W-Q)ᵀ) `[out]`: each row's mean squared output error over H's tokens."""
    e = weight - restore(q, grid)
    return ((e @ gram) * e).sum(-1)


def solve(weight: Tensor, grid: Grid, gram: Tensor, damping: float) -> Tensor:
    """Integers for `weight` on `grid`; a row keeps plain rounding where feedback measures worse."""
    fed = round_with_feedback(weight, grid, *feedback(gram, damping))
    plain = round_to(weight, grid)
    better = row_error(weight, fed, grid, gram) < row_error(weight, plain, grid, gram)
    return torch.where(better[:, None], fed, plain)
