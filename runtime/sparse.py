"""Linears that leave out small inputs when they decode, and read whole prompts densely.

The weight is held input by input (kernels/cpu_sparse.py, cpu_columns.py, triton_gather.py) and once
only: for many tokens 16 bits are widened a slice of inputs at a time. Where no kernel can do it, or
where an input's weights are too short a run of memory to be left out with profit, the inputs are
set to zero and the dense linear runs: the same result, at the dense speed.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from optim.runtime.formats.packed import unpack
from optim.runtime.formats.packed_linear import PackedLinear
from optim.runtime.formats.schemes import Scheme
from optim.runtime.kernels import cpu_columns, cpu_sparse

if TYPE_CHECKING:
    from optim.runtime.kernels.triton_gather import Gather

    Columns = cpu_sparse.Columns | cpu_columns.Columns | Gather

FEW = 4  # sequences decoded at once that each skip their own inputs; more run densely
SLICE = 1 << 20  # weights widened at a time
SHORT = 1536  # bytes of an input's 4-bit weights below which reading all was as fast as skipping


class SparseLinear(nn.Module):
    """y = W x + b, where decoding leaves out x_k with |x_k| <= `threshold`; float32 on a CPU."""

    def __init__(self, columns: "Columns", threshold: float) -> None:
        super().__init__()
        self.columns, self.threshold = columns, threshold

    def forward(self, x: Tensor) -> Tensor:
        """x `[B, T, in]` -> `[B, T, out]`; sparse where T is 1 and B is at most FEW."""
        if x.shape[1] > 1 or x.shape[0] > FEW:
            return dense(self.columns, x)
        rows = [self.columns(row, self.threshold) for row in x[:, 0]]
        return rows[0].view(1, 1, -1) if len(rows) == 1 else torch.stack(rows).unsqueeze(1)

    @property
    def skipped_bytes(self) -> float:
        """Bytes of weights not read for a token, on average over the tokens decoded so far."""
        columns = self.columns
        if not columns.calls:
            return 0.0
        return columns.nbytes * (1 - float(columns.used) / (columns.calls * columns.inputs))


class MaskedLinear(nn.Module):
    """`inner`, with the same inputs set to zero as SparseLinear leaves out."""

    threshold: float

    def __init__(self, inner: nn.Module, threshold: float) -> None:
        super().__init__()
        self.inner, self.threshold = inner, threshold

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1 and x.shape[0] <= FEW:
            x = torch.where(x.abs() <= self.threshold, 0, x)
        y: Tensor = self.inner(x)
        return y


def dense(columns: "Columns", x: Tensor) -> Tensor:
    """x `[..., in]` through all the columns: `[..., out]`."""
    rows, outputs = x.reshape(-1, x.shape[-1]), columns.outputs
    if isinstance(columns, cpu_columns.Columns):
        return columns(rows).view(*x.shape[:-1], outputs)
    y = rows.new_zeros(rows.shape[0], outputs)
    step = max(1, SLICE // outputs)
    for start in range(0, columns.inputs, step):
        part = slice(start, min(start + step, columns.inputs))
        y.addmm_(rows[:, part], columns.wide(part).to(y.dtype))
    bias = columns.bias
    return (y if bias is None else y + bias.to(y.dtype)).view(*x.shape[:-1], outputs)


def sparse_dense(weight: Tensor, bias: Tensor | None, threshold: float) -> SparseLinear | None:
    """A plain weight `[out, in]` as SparseLinear; None where no kernel reads it."""
    if weight.device.type == "cuda" and find_spec("triton"):
        from optim.runtime.kernels import triton_gather

        tensors = triton_gather.dense_layout(weight, bias)
        return SparseLinear(triton_gather.Gather(weight.shape[0], tensors, 0), threshold)
    fits = weight.device.type == "cpu" and weight.dtype in cpu_sparse.KINDS
    if not fits or not cpu_sparse.usable():
        return None
    return SparseLinear(cpu_sparse.linear(weight, bias), threshold)


def sparse_packed(linear: PackedLinear, threshold: float) -> SparseLinear | None:
    """A packed linear that is not prepared yet as SparseLinear; None where that does not pay."""
    scale = linear.weight_scale
    if scale is None or scale.dtype != torch.bfloat16 or not _readable(linear.scheme, scale.device):
        return None  # scales of another type would have to be rounded
    q, scale, zero = unpack(linear.stored(), linear.scheme, linear.name)
    short = scale.device.type == "cpu" and q.shape[0] // 2 < SHORT
    if short and threshold != cpu_columns.NOTHING:
        return None
    parts = q, scale, zero, linear.scheme, linear.bias
    if scale.device.type == "cuda":
        from optim.runtime.kernels import triton_gather

        tensors, group = triton_gather.int4_layout(*parts), linear.scheme.group_size
        return SparseLinear(triton_gather.Gather(q.shape[0], tensors, group), threshold)
    lines = cpu_columns.NARROW if threshold == cpu_columns.NOTHING else cpu_columns.LINES
    return SparseLinear(cpu_columns.packed(*parts, lines), threshold)


def _readable(scheme: Scheme, device: torch.device) -> bool:
    if device.type == "cuda":
        group = scheme.group_size
        return bool(find_spec("triton")) and scheme.bits <= 4 and group in (16, 32, 64, 128, 256)
    return device.type == "cpu" and cpu_columns.supports(scheme) and cpu_columns.usable()
