"""What a linear of the decoder is, whatever its format; and the linears that wrap another.

A format's class is a `Linear` with two class methods beside (`Kind`) and a row of `LINEARS` in
kinds.py. What it cannot do better is answered here: always right, if no faster.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from optim.runtime.decoder.linears.source import Source
from optim.runtime.kernels.cpu.decode import Reader
from optim.runtime.kernels.cpu.skip_dense import Columns, Rows
from optim.runtime.kernels.cpu.skip_int4 import NOTHING

FEW = 4  # sequences decoded at once that each skip their own inputs; more run densely


class Table(Protocol):
    """Rows by their numbers, int64 of any shape: `table[ids]` is `[..., in]`."""

    def __getitem__(self, ids: Tensor, /) -> Tensor: ...


class Linear(nn.Module, ABC):
    """y = x W^T + b: x `[..., in]` -> y `[..., out]`, in the compute dtype."""

    in_features: int
    out_features: int

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of weights that a decoded token reads, if it leaves nothing out."""

    @property
    def skipped_bytes(self) -> float:
        """Of those, how many were left out on average over the tokens decoded so far."""
        return 0.0

    @property
    def recordable(self) -> bool:
        """Whether a recorded step may hold it: the host decides and counts nothing in a call."""
        return True

    @property
    def alike(self) -> int:
        """So many tokens at once each get, in every bit, what they get alone."""
        return 1

    @property
    def table(self) -> Table | None:
        """The weight as an embedding table, where the head and the embedding are one."""
        return None

    @property
    def c_reader(self) -> Reader | None:
        """What the C step over all blocks reads of it; None: that step cannot run it."""
        return None

    @property
    def c_rows(self) -> Rows | None:
        """What the C kernel of a gated feed-forward reads of it as `up`; None as above."""
        return None

    @property
    def c_columns(self) -> Columns | None:
        """The same as `down`."""
        return None

    def with_outputs(self, rows: Tensor) -> "Linear":
        """A linear with only the outputs `rows`, int64 `[n]`, ascending."""
        return Picked(self, rows)

    def with_inputs(self, columns: Tensor, shift: Tensor | None = None) -> "Linear":
        """One with only the inputs `columns`, its bias included, and `shift` `[out]` added."""
        return Spread(self, columns, shift)


class Kind(Protocol):
    """A linear that is read from a checkpoint: the class itself, with these two."""

    def claims(self, source: Source, names: Sequence[str]) -> bool:
        """Whether the linears `names` are stored so that this kind computes them side by side."""
        ...

    def load(self, source: Source, names: Sequence[str], below: float | None) -> Linear:
        """Them as one. Decoding, inputs up to `below` in size are left out.

        Raises OptimError (2), naming the tensor, for one that is missing or damaged.
        """
        ...


class Joined(Linear):
    """Linears of different formats that read one input: outputs side by side."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        super().__init__()
        self.parts: Sequence[Linear] = nn.ModuleList(parts)  # type: ignore[assignment]
        self.in_features, self.out_features = (
            parts[0].in_features,
            sum(part.out_features for part in parts),
        )

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def skipped_bytes(self) -> float:
        return sum(part.skipped_bytes for part in self.parts)

    @property
    def recordable(self) -> bool:
        return all(part.recordable for part in self.parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], -1)


class _Around(Linear):
    """A linear that is another, with something before or after it."""

    def __init__(self, inner: Linear) -> None:
        super().__init__()
        self.inner, self.in_features, self.out_features = (
            inner,
            inner.in_features,
            inner.out_features,
        )

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes


class MaskedLinear(_Around):
    """`inner`, where decoding sets x_k with |x_k| <= `threshold` to zero: read, and not used."""

    def __init__(self, inner: Linear, threshold: float) -> None:
        super().__init__(inner)
        self.threshold = threshold

    @property
    def recordable(self) -> bool:
        return False

    @property
    def c_reader(self) -> Reader | None:
        reader = self.inner.c_reader
        return None if reader is None else replace(reader, threshold=self.threshold)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1 and x.shape[0] <= FEW:
            x = torch.where(x.abs() <= self.threshold, 0, x)
        y: Tensor = self.inner(x)
        return y


def masked(linear: Linear, below: float | None) -> Linear:
    """`linear` without the inputs up to `below`, where no kernel leaves them out with profit."""
    return linear if below is None or below == NOTHING else MaskedLinear(linear, below)


def added(bias: Tensor | None, shift: Tensor | None) -> Tensor | None:
    """The sum of two that may not be there, in the dtype of `bias`."""
    if bias is None or shift is None:
        return shift if bias is None else bias
    return bias + shift.to(bias)


class Picked(_Around):
    """The outputs `rows` of a linear that cannot be gathered here: right, and no faster."""

    def __init__(self, inner: Linear, rows: Tensor) -> None:
        super().__init__(inner)
        self.rows, self.out_features = rows, len(rows)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y[..., self.rows]


class Spread(_Around):
    """A linear that cannot be gathered here, the inputs beside `columns` zero."""

    def __init__(self, inner: Linear, columns: Tensor, shift: Tensor | None) -> None:
        super().__init__(inner)
        self.columns, self.shift, self.in_features = columns, shift, len(columns)

    def forward(self, x: Tensor) -> Tensor:
        whole = x.new_zeros(*x.shape[:-1], self.inner.in_features)
        whole[..., self.columns] = x
        y: Tensor = self.inner(whole)
        return y if self.shift is None else y + self.shift.to(y.dtype)
