"""A feed-forward whose gate says what need not be computed: ReLU's zeros (exact), or CATS.

    h = act(gate(x)) * up(x),   y = down(h)

The gate is computed whole. Of the neurons with |act(gate)| <= threshold, rows of `up` and inputs of
`down` are not read; with ReLU and threshold 0 that loses nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optim.runtime.decoder.linears.base import FEW, Linear
from optim.runtime.decoder.linears.dense import DenseLinear
from optim.runtime.decoder.linears.sparse import dense
from optim.runtime.kernels.cpu import skip_dense


@dataclass(slots=True)
class GatedFeedForward:
    """`gate` `[neurons, hidden]` dense; `up` and `down` in the layouts that can be skipped."""

    gate: Linear
    up: skip_dense.Rows
    down: skip_dense.Columns
    act: Callable[[Tensor], Tensor]
    threshold: float
    used: int = 0
    calls: int = 0
    running: None = None
    recordable: bool = False

    @property
    def nbytes(self) -> int:
        return self.gate.nbytes + self.up.weight.nbytes + self.down.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """x `[B, T, hidden]`; sparse where T is 1 and B is at most FEW."""
        gate = self.act(self.gate(x))
        if x.shape[1] > 1 or x.shape[0] > FEW:
            return dense(self.down, gate * DenseLinear(self.up.weight, self.up.bias)(x))
        rows = [self._one(*row) for row in zip(x[:, 0], gate[:, 0], strict=True)]
        return torch.stack(rows).unsqueeze(1)

    def _one(self, x: Tensor, gate: Tensor) -> Tensor:
        y, used = skip_dense.gated(self.up, self.down, x, gate, self.threshold)
        self.used += used
        self.calls += 1
        return y

    @property
    def skipped_bytes(self) -> float:
        if not self.calls:
            return 0.0
        share = 1 - self.used / (self.calls * self.down.inputs)
        return share * (self.up.weight.nbytes + self.down.nbytes)


@dataclass(slots=True)
class MaskedGate:
    """The same where no kernel reads `up` row by row: its rows are computed, then not used."""

    up: Linear
    down: Linear
    act: Callable[[Tensor], Tensor]
    threshold: float
    running: None = None
    skipped_bytes: float = 0.0
    recordable: bool = False

    @property
    def nbytes(self) -> int:
        return self.up.nbytes + self.down.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """x `[B, T, hidden]`; `up` is gate and up side by side."""
        both: Tensor = self.up(x)
        gate, up = both.chunk(2, -1)
        gate = self.act(gate)
        if x.shape[1] == 1 and x.shape[0] <= FEW:
            gate = torch.where(gate.abs() <= self.threshold, 0, gate)
        y: Tensor = self.down(gate * up)
        return y


def gated_feed_forward(
    load: Callable[..., Linear],
    names: Sequence[str],
    down_name: str,
    act: Callable[[Tensor], Tensor],
    threshold: float,
) -> GatedFeedForward | MaskedGate:
    """A feed-forward that leaves out what its gate makes small.

    `load(*names, below=None)` gives linears; `names` are those of gate and up.
    """
    down = load(down_name, below=0.0)
    if down.c_columns is not None:
        up = load(names[1])
        if up.c_rows is not None:
            return GatedFeedForward(load(names[0]), up.c_rows, down.c_columns, act, threshold)
    return MaskedGate(load(*names), down, act, threshold)
