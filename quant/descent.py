"""Move integers that are already chosen, one at a time, downhill on the output error.

With E = W - W' and the Gram matrix H the error is tr(E H Eᵀ). Moving q_k of a row by d steps of its
scale s changes it by s d (s d H_kk - 2 (E H)_k): the best d is (E H)_k / (s H_kk), rounded. Error
feedback rounds a column knowing only the columns before it; this looks at all of them. A sweep
costs what the feedback does.
"""

import numba
import numpy as np
import torch
from torch import Tensor

from optim.quant.grid import Grid, restore, spread
from optim.quant.refit import refit_scales

BLOCK = 128  # columns whose slope is computed at a time
TILE = 64  # rows moved side by side


def descend(
    weight: Tensor, q: Tensor, grid: Grid, gram: Tensor, sweeps: int, dtype: torch.dtype
) -> tuple[Tensor, Grid]:
    """(integers, grid) of rows with no larger output error; integers float32 `[rows, in]`.

    weight `[rows, in]`, gram `[in, in]`. Integers and scales move in turn, the zero points stay.
    """
    for _ in range(sweeps):
        q = sweep(weight, q, grid, gram)
        grid = refit_scales(weight, q, grid, gram, dtype)
    return q, grid


def sweep(weight: Tensor, q: Tensor, grid: Grid, gram: Tensor) -> Tensor:
    """Every column once: the integers after it, float32 `[rows, in]`."""
    # Transposed: a column's rows lie side by side, and they are moved side by side.
    error = (weight - restore(q, grid)).T.contiguous()
    q, scale = q.T.contiguous(), spread(grid.scale, weight.shape[1]).T
    move = _move if q.device.type == "cpu" else move_reference
    for start in range(0, len(q), BLOCK):
        part = slice(start, start + BLOCK)
        corner = gram[part, part]
        move(q[part], error[part], gram[part] @ error, scale[part], corner, float(grid.top))
    return q.T.contiguous()


def _move(
    q: Tensor, error: Tensor, slope: Tensor, scale: Tensor, corner: Tensor, top: float
) -> None:
    arrays = (t.contiguous().numpy() for t in (slope, scale, corner))
    _move_tiles(q.numpy(), error.numpy(), *arrays, np.float32(top))  # type: ignore[call-arg]


def move_reference(
    q: Tensor, error: Tensor, slope: Tensor, scale: Tensor, corner: Tensor, top: float
) -> None:
    """Move the columns of a block in place: q, error, slope, scale `[b, rows]`, corner `[b, b]`."""
    slope = slope.clone()
    for k in range(len(q)):
        if corner[k, k] <= 0:
            continue
        moved = (q[k] + (slope[k] / (scale[k] * corner[k, k])).round()).clamp(0, top)
        change = (moved - q[k]) * scale[k]
        q[k] = moved
        error[k] -= change
        slope -= corner[:, k : k + 1] * change


@numba.njit(parallel=True, fastmath=True, cache=True)
def _move_tiles(q, error, slope, scale, corner, top):  # type: ignore[no-untyped-def]
    columns, rows = q.shape
    for tile in numba.prange((rows + TILE - 1) // TILE):
        first = tile * TILE
        here = min(TILE, rows - first)
        value = slope[:, first : first + here].copy()
        change = np.empty(here, np.float32)
        for k in range(columns):
            own = corner[k, k]
            if own <= 0:
                continue
            for r in range(here):
                s, old = scale[k, first + r], q[k, first + r]
                moved = min(max(old + np.rint(value[k, r] / (s * own)), np.float32(0)), top)
                change[r] = (moved - old) * s
                q[k, first + r] = moved
                error[k, first + r] -= change[r]
            for j in range(k + 1, columns):
                for r in range(here):
                    value[j, r] -= change[r] * corner[j, k]
