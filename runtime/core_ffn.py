"""A feed-forward that watches a prompt, chooses its core neurons and decodes with those alone.

Kept rows of gate and up, and kept columns of down, are gathered into a compact feed-forward, so
that decoding runs the ordinary kernels on fewer weights. `down` lies input by input, where a neuron
is one run of memory, packed groups included. What the other neurons give on average is a bias:

    y = W[:, kept] h[kept] + b,     b = bias + W[:, rest] mean[rest]
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optim.runtime.core import scores
from optim.runtime.formats.packed_linear import PackedLinear
from optim.runtime.kernels import cpu_columns, cpu_sparse, cpu_w4a8
from optim.runtime.kernels.cpu_columns import NOTHING
from optim.runtime.kernels.gathered import gather_columns, gather_rows
from optim.runtime.layers import MLP
from optim.runtime.linear import DenseLinear
from optim.runtime.side import Core, Side
from optim.runtime.sparse import SparseLinear


@dataclass(slots=True)
class CoreFeedForward:
    """`mlp` with all its neurons, or with the chosen ones; `mode` says what a call does."""

    mlp: MLP
    core: Core
    side: Side
    mode: str = "dense"  # or "watch": dense, and scores are added up; or "sparse"
    score: Tensor | None = None
    compact: MLP | None = None
    _dtype: torch.dtype = torch.float32

    @property
    def running(self) -> MLP:
        """The feed-forward that a call computes."""
        return self.compact if self.mode == "sparse" and self.compact is not None else self.mlp

    def __call__(self, x: Tensor) -> Tensor:
        if self.running is not self.mlp:
            return self.running(x)
        h = self.mlp.inner(x)
        self._dtype = h.dtype
        if self.mode == "watch":
            now = scores(h.flatten(0, -2), self.core.norm, self.side.options)
            self.score = now if self.score is None else self.score + now
        y: Tensor = self.mlp.down(h)
        return y

    def keep(self, neurons: Tensor) -> None:
        """Gather the compact feed-forward of `neurons` (int64, ascending)."""
        total = int(self.core.norm.numel()) if self.core.norm is not None else 0
        if len(neurons) == total:
            self.compact = self.mlp
            return
        rows = torch.cat((neurons, neurons + total)) if self.mlp.gated else neurons
        down = columns_of(self.mlp.down, neurons, self._rest(neurons))
        self.compact = MLP(rows_of(self.mlp.up, rows), down, self.mlp.act, self.mlp.gated)

    def _rest(self, neurons: Tensor) -> Tensor | None:
        """What all but `neurons` give on average, `[out]`; None where no means are known."""
        if self.core.mean is None:
            return None
        mean = self.core.mean.to(neurons.device, self._dtype).index_fill(0, neurons, 0)
        both: Tensor = self.mlp.down(torch.stack((mean, torch.zeros_like(mean)))[:, None])
        return both[0, 0] - both[1, 0]  # without the bias


def rows_of(linear: nn.Module, rows: Tensor) -> nn.Module:
    """A linear with only the outputs `rows`."""
    if isinstance(linear, DenseLinear):
        bias = None if linear.bias is None else linear.bias[rows]
        return DenseLinear(linear.weight[rows], bias)
    if isinstance(linear, PackedLinear) and isinstance(linear.kernel, cpu_w4a8.Weight):
        return Kernel(gather_rows(linear.kernel, rows))
    return Picked(linear, rows)


def columns_of(linear: nn.Module, columns: Tensor, shift: Tensor | None = None) -> nn.Module:
    """A linear with only the inputs `columns`, its bias included, and `shift` `[out]` added."""
    if isinstance(linear, SparseLinear):
        held, bias = linear.columns, _sum(linear.columns.bias, shift)
        if isinstance(held, cpu_columns.Columns):
            return SparseLinear(gather_columns(held, columns, bias), NOTHING)
        if isinstance(held, cpu_sparse.Columns):
            rows = cpu_sparse.Columns(held.outputs, held.weight[columns], bias)
            return SparseLinear(rows, NOTHING)
    if isinstance(linear, DenseLinear):
        return DenseLinear(linear.weight[:, columns].contiguous(), _sum(linear.bias, shift))
    return Spread(linear, columns, shift)


def _sum(bias: Tensor | None, shift: Tensor | None) -> Tensor | None:
    if bias is None or shift is None:
        return shift if bias is None else bias
    return bias + shift.to(bias)


class Kernel(nn.Module):
    """A linear that is a kernel's weight alone."""

    def __init__(self, kernel: cpu_w4a8.Weight) -> None:
        super().__init__()
        self.kernel = kernel

    @property
    def nbytes(self) -> int:
        return self.kernel.nbytes

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


class Picked(nn.Module):
    """The outputs `rows` of a linear that cannot be gathered here: right, and no faster."""

    def __init__(self, inner: nn.Module, rows: Tensor) -> None:
        super().__init__()
        self.inner, self.rows = inner, rows

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y[..., self.rows]


class Spread(nn.Module):
    """A linear that cannot be gathered here, the inputs beside `columns` zero."""

    def __init__(self, inner: nn.Module, columns: Tensor, shift: Tensor | None) -> None:
        super().__init__()
        self.inner, self.columns, self.shift = inner, columns, shift

    def forward(self, x: Tensor) -> Tensor:
        width = int(self.columns.max()) + 1
        whole = x.new_zeros(*x.shape[:-1], max(width, _inputs(self.inner)))
        whole[..., self.columns] = x
        y: Tensor = self.inner(whole)
        return y if self.shift is None else y + self.shift.to(y.dtype)


def _inputs(linear: nn.Module) -> int:
    return int(getattr(getattr(linear, "kernel", linear), "inputs", 0))
