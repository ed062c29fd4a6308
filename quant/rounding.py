"""Round a linear some rows at a time: plainly, or with all that is known of its inputs."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from optim.quant import awq, gptq
from optim.quant.descent import descend
from optim.quant.grid import Grid, make_grid, nearest, ranges, restore, round_to
from optim.quant.refit import refit_scales
from optim.runtime.formats.pack_quantized import Scheme
from optim.runtime.walk.walk import StoredLinear

ROW_BYTES = 16 * 2**20  # float32 rows of a linear that are solved at a time


class RoundedLinear(StoredLinear):
    """A linear as it is stored after rounding: integers and a grid; `dense` is what runs."""

    def __init__(self, q: Tensor, grid: Grid, bias: Tensor | None) -> None:
        super().__init__(q.to(torch.uint8), bias)
        self.grid = grid

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """Rows of the weight the integers stand for, float32 `[rows, in]`."""
        return restore(self.weight[rows], self.grid.rows(rows))


class NearestLinear(StoredLinear):
    """A linear rounded plainly, on the fly: what the method is compared with, at no memory.

    Its folds are those that `linear` has now, whatever becomes of them later.
    """

    def __init__(self, linear: StoredLinear, scheme: Scheme, dtype: torch.dtype) -> None:
        super().__init__(linear.weight, linear.bias)
        self.in_scale, self.out_scale = linear.in_scale, linear.out_scale
        self.scheme, self.scale_dtype = scheme, dtype

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """Rows of the rounded weight, float32 `[rows, in]`."""
        return restore(*self._nearest(rows))

    def rounded(self) -> RoundedLinear:
        """The same with its integers, to be stored."""
        return round_linear(self, self.scheme, self._nearest)

    def _nearest(self, rows: slice, _group: int = 0) -> tuple[Tensor, Grid]:
        return nearest(super().dense(rows), self.scheme, self.scale_dtype)


def row_groups(rows: int, groups: int) -> list[slice]:
    """The rows of a linear in `groups` parts, as even as they can be (`torch.tensor_split`)."""
    sizes = [rows // groups + (k < rows % groups) for k in range(groups)]
    return [slice(sum(sizes[:k]), sum(sizes[: k + 1])) for k in range(groups)]


def round_linear(
    linear: StoredLinear,
    scheme: Scheme,
    solve: Callable[[slice, int], tuple[Tensor, Grid]],
    groups: int = 1,
) -> RoundedLinear:
    """A linear rounded some rows at a time: `solve` gives the (integers, grid) of rows, all of them
    of one of the `groups`.

    The parts go straight into their place: at any time one part's temporaries are alive.
    """
    shape = (linear.out_features, linear.in_features)
    place = linear.weight.device
    q = torch.empty(shape, dtype=torch.uint8, device=place)
    scale, zero = (torch.empty(shape[0], scheme.groups(shape[1]), device=place) for _ in "sz")
    heads = list[Tensor]()
    for rows, k in _parts(linear, groups):
        q[rows], grid = solve(rows, k)
        scale[rows], zero[rows] = grid.scale, grid.zero
        heads += [] if grid.heads is None else [grid.heads]
    grid = Grid(scale, zero, scheme, torch.cat(heads) if heads else None)
    return RoundedLinear(q, grid, linear.dense_bias())


def descend_linear(
    linear: StoredLinear,
    rounded: RoundedLinear,
    grams: list[Tensor],
    sweeps: int,
    dtype: torch.dtype,
) -> None:
    """Move the integers and scales of `rounded` downhill, each group of rows on its gram."""
    grid = rounded.grid
    for rows, k in _parts(linear, len(grams)):
        part = Grid(grid.scale[rows], grid.zero[rows], grid.scheme)
        q = rounded.weight[rows].float()
        q, part = descend(linear.dense(rows), q, part, grams[k], sweeps, dtype)
        rounded.weight[rows], grid.scale[rows] = q.to(torch.uint8), part.scale


def _parts(linear: StoredLinear, groups: int) -> Iterator[tuple[slice, int]]:
    """The rows of a linear some at a time, with the group of rows that they are of."""
    step = max(1, ROW_BYTES // (4 * linear.in_features))
    for k, part in enumerate(row_groups(linear.out_features, groups)):
        for start in range(part.start, part.stop, step):
            yield slice(start, min(start + step, part.stop)), k


def round_rows(
    weight: Tensor,
    scheme: Scheme,
    blocks: Tensor | None,
    known: gptq.Feedback | Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Grid]:
    """Rows of a weight `[rows, in]` -> (integers as bytes, grid): clip if there are `blocks`.

    Rounding is with error feedback if that is `known`; else that is the Gram matrix, and the scales
    are refitted to the plain integers, but for GGUF's grids, which are fitted before.
    """
    if blocks is not None:
        grid = awq.search_clip(weight, blocks, scheme, dtype)
    else:
        grid = make_grid(*ranges(weight, scheme), scheme, dtype)
    if isinstance(known, gptq.Feedback):
        return gptq.round_with_feedback(weight, grid, known).to(torch.uint8), grid
    q = round_to(weight, grid)
    if scheme.blocks is None:
        grid = refit_scales(weight, q, grid, known, dtype)
    return q.to(torch.uint8), grid
