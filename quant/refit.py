"""Least-squares scales for integers that are already chosen.

With q fixed, the restored row is linear in its group scales s: w' = Σ_g s_g (q_g - z_g). The output
error (w - w') H (w - w')ᵀ is then a quadratic in s with one small system a row,

    A_gg' = p_g H_gg' p_g'ᵀ,   b_g = p_g (H wᵀ)_g,   p = q - z,

whose solution also takes back error *across* groups, which no choice of range can see.
"""

import torch
from torch import Tensor

from optim.quant.grid import Grid, grouped

RIDGE = 1e-4


def refit_scales(weight: Tensor, q: Tensor, grid: Grid, gram: Tensor, dtype: torch.dtype) -> Grid:
    """The grid with refitted scales; rows whose output error would not fall keep theirs.

    weight, q `[out, in]`, gram `[in, in]`; the scales are rounded to `dtype` before comparing.
    """
    p = grouped(q, grid.scheme) - grid.zero[..., None]
    groups, size = p.shape[1:]
    target = grouped(weight @ gram, grid.scheme)
    b = (p * target).sum(-1)
    a = torch.stack(
        [
            (p[:, g] @ gram[g * size : (g + 1) * size]).view(-1, groups, size).mul_(p).sum(-1)
            for g in range(groups)
        ],
        dim=1,
    )
    diagonal = a.diagonal(dim1=1, dim2=2)
    ridge = RIDGE * diagonal.mean(-1, keepdim=True) + 1e-20
    damped = a + torch.diag_embed(ridge.expand_as(diagonal))
    scale = torch.linalg.solve(damped, b + ridge * grid.scale).to(dtype).float()
    usable = (scale > 0).all(-1) & scale.isfinite().all(-1)
    better = usable & (_error(a, b, scale) < _error(a, b, grid.scale))
    return Grid(torch.where(better[:, None], scale, grid.scale), grid.zero, grid.scheme)


def _error(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Each row's output error `[out]` at these scales, less what does not depend on them."""
    return ((scale[:, None] @ a).squeeze(1) * scale - 2 * b * scale).sum(-1)
