"""Linears that are not packed.

A CPU without bf16 units multiplies bf16 at a tenth of its fp32 rate. Weights stored in bf16 stay so
there, half the memory and half the bytes a token: a C kernel reads them for a few tokens, and for
many they are widened a slice at a time. Without a C compiler they are held in fp32.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from optim.runtime.decoder.linears.base import Linear, Table, added, masked
from optim.runtime.decoder.linears.source import Source
from optim.runtime.decoder.linears.sparse import sparse_dense
from optim.runtime.kernels.cpu import bf16 as cpu_bf16
from optim.runtime.kernels.cpu import skip_dense
from optim.runtime.kernels.cpu.decode import Reader
from optim.runtime.kernels.cpu.dense import Dense
from optim.runtime.kernels.huge_pages import use_huge_pages

SLICE = 1 << 20  # weights widened at a time: 4 MB in fp32
FEW = cpu_bf16.FEW_TOKENS


class Matrix(Protocol):
    """A matrix `[out, in]`, some rows at a time."""

    @property
    def shape(self) -> Sequence[int]: ...
    def __getitem__(self, rows: slice, /) -> Tensor: ...


class DenseLinear(Linear):
    """y = x W^T + b; `x` `[..., in]` in the compute dtype, `weight` `[out, in]` in that or bf16."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.out_features, self.in_features = weight.shape

    @classmethod
    def claims(cls, source: Source, names: Sequence[str]) -> bool:
        """Plain weights; and whatever is left, of which it says what is missing."""
        packed = any(source.has(f"{name}.weight_packed") for name in names)
        return len(names) == 1 or (not packed and source.alike(names, "bias"))

    @classmethod
    def load(cls, source: Source, names: Sequence[str], below: float | None = None) -> Linear:
        """See Kind. Held input by input where a kernel leaves inputs out, else row by row."""
        weights = [stored_weight(source, f"{name}.weight") for name in names]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        del weights
        bias = source.bias(names, source.dtype)
        if below is not None and (sparse := sparse_dense(weight, bias, below)) is not None:
            return sparse
        use_huge_pages(weight)
        return masked(cls(weight, bias), below)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    @property
    def alike(self) -> int:
        return FEW if self.weight.is_cpu and self.weight.dtype == torch.bfloat16 else 1

    @property
    def table(self) -> Table:
        return self.weight

    @property
    def c_reader(self) -> Reader | None:
        narrow = self.alike == FEW
        return Reader(Dense(self.weight, self.bias)) if narrow else None

    @property
    def c_rows(self) -> skip_dense.Rows | None:
        return skip_dense.Rows(self.weight, self.bias) if skip_dense.reads(self.weight) else None

    def with_outputs(self, rows: Tensor) -> Linear:
        return DenseLinear(self.weight[rows], None if self.bias is None else self.bias[rows])

    def with_inputs(self, columns: Tensor, shift: Tensor | None = None) -> Linear:
        return DenseLinear(self.weight[:, columns].contiguous(), added(self.bias, shift))

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype == x.dtype:
            return F.linear(x, self.weight, self.bias)
        rows = x.reshape(-1, x.shape[-1])
        product = cpu_bf16.linear if rows.shape[0] <= FEW else many
        y = product(rows, self.weight)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y.add_(self.bias)


def many(x: Tensor, weight: Matrix) -> Tensor:
    """x W^T for many tokens, `weight` bf16 widened to the dtype of `x` a slice at a time."""
    outputs, inputs = weight.shape
    step = max(1, SLICE // inputs)
    y, wide = x.new_empty(x.shape[0], outputs), x.new_empty(min(step, outputs), inputs)
    for start in range(0, outputs, step):
        part = weight[start : start + step]
        y[:, start : start + step] = x @ wide[: part.shape[0]].copy_(part).T
    return y


def stored_weight(source: Source, name: str) -> Tensor:
    """A dense matrix in the dtype that suits this machine."""
    stored = source.checkpoint.read(name)
    return stored.to(source.device, held_dtype(stored.dtype, source.dtype)).contiguous()


def held_dtype(stored: torch.dtype, compute: torch.dtype) -> torch.dtype:
    """The dtype in which a dense weight stored as `stored` is kept."""
    keep = compute == torch.float32 and stored == torch.bfloat16 and cpu_bf16.usable()
    return stored if keep else compute
