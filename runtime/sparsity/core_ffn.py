"""A feed-forward that watches a prompt, chooses its core neurons and decodes with those alone.

Kept rows of gate and up, and kept columns of down, are gathered into a compact feed-forward, so
that decoding runs the ordinary kernels on fewer weights. `down` lies input by input, where a neuron
is one run of memory, packed groups included. What the other neurons give on average is a bias:

    y = W[:, kept] h[kept] + b,     b = bias + W[:, rest] mean[rest]
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from optim.runtime.decoder.layers import MLP
from optim.runtime.sparsity.core_neurons import scores
from optim.runtime.sparsity.side_file import Core, Side


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

    @property
    def nbytes(self) -> int:
        return self.mlp.nbytes

    @property
    def skipped_bytes(self) -> float:
        """What the compact feed-forward lacks of the whole one."""
        return self.mlp.nbytes - self.running.nbytes

    @property
    def recordable(self) -> bool:
        return False

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
        up = self.mlp.up.with_outputs(rows)
        down = self.mlp.down.with_inputs(neurons, self._rest(neurons))
        self.compact = MLP(up, down, self.mlp.act, self.mlp.gated)

    def _rest(self, neurons: Tensor) -> Tensor | None:
        """What all but `neurons` give on average, `[out]`; None where no means are known."""
        if self.core.mean is None:
            return None
        mean = self.core.mean.to(neurons.device, self._dtype).index_fill(0, neurons, 0)
        both: Tensor = self.mlp.down(torch.stack((mean, torch.zeros_like(mean)))[:, None])
        return both[0, 0] - both[1, 0]  # without the bias
