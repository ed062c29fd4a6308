"""From a checkpoint's tensors to the linears, tables and norms of a decoder.

Tensors are read one at a time and go straight to their place. Packed linears stay packed; those
that read the same tensor (q, k, v; gate, up) become one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from optim.runtime.architecture.table import Decoder as Facts
from optim.runtime.decoder.layers import HeadNorm, LayerNorm, Norm, RMSNorm
from optim.runtime.decoder.linears.base import Joined, Linear, Table
from optim.runtime.decoder.linears.dense import DenseLinear
from optim.runtime.decoder.linears.kinds import LINEARS
from optim.runtime.decoder.linears.source import Source
from optim.runtime.decoder.linears.static_int import static_reader
from optim.runtime.sparsity.side_file import BlockSide, Side
from optim.runtime.storage.dense_view import PlainView

DENSE = BlockSide({}, None, None)


@dataclass(slots=True)
class Loader(Source):
    """Makes the modules of one checkpoint, with the rules of its side file."""

    side: Side | None = None

    def rules(self, index: int) -> BlockSide:
        """What block `index` leaves out."""
        return DENSE if self.side is None else self.side.blocks[index]

    def linear(self, *names: str, below: float | None = None) -> Linear:
        """One module that computes the linears `names` side by side.

        Decoding, it leaves out inputs up to `below` in size. Raises OptimError (2) naming a tensor
        that is missing or damaged.
        """
        kind = next((kind for kind in LINEARS if kind.claims(self, names)), None)
        if kind is None:
            return Joined([self.linear(name, below=below) for name in names])
        return kind.load(self, names, below)

    def table(self, name: str) -> Table:
        """An embedding table as it is stored, or as planes where the model is packed."""
        kind = next(kind for kind in LINEARS if kind.claims(self, (name,)))
        table = None if kind is DenseLinear else kind.load(self, (name,), None).table
        if table is None:  # no kernel here that looks rows up: floats
            return PlainView(self.checkpoint).read(f"{name}.weight").to(self.device)
        return table

    def norm(self, name: str, facts: Facts, eps: float, offset: int) -> Norm:
        """The norm module `name`; a LayerNorm without affine parameters has no tensors."""
        static = self.once(static_reader)
        if static is not None and static.has(name):
            return static.norm(name, eps)
        weight = self._float(f"{name}.weight")
        if facts.layer_norm:
            return LayerNorm(weight, self._float(f"{name}.bias"), eps)
        if weight is None:
            weight = self.tensor(f"{name}.weight")  # says what is missing
        return RMSNorm(weight + offset if offset else weight, eps)

    def head_norm(self, path: str, head_dim: int, eps: float, offset: int) -> HeadNorm | None:
        """The norms of queries and keys under `path`, if there are any."""
        if not self.has(f"{path}.q_norm.weight"):
            return None
        query = self.tensor(f"{path}.q_norm.weight", torch.float32) + offset
        key = self.tensor(f"{path}.k_norm.weight", torch.float32) + offset
        return HeadNorm(query, key, eps, full=query.numel() != head_dim)

    def _float(self, name: str) -> Tensor | None:
        return self.tensor(name, torch.float32) if self.has(name) else None
