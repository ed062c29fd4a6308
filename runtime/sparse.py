"""Linears that leave out small inputs when they decode, and read whole prompts densely.

The weight is held input by input (kernels/cpu_sparse.py, triton_gather.py) and once only: for many
tokens it is widened a slice of inputs at a time. Where there is no such kernel the inputs are set
to zero and the dense linear runs: the same result, at the dense speed.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from optim.runtime.formats.packed import unpack
from optim.runtime.formats.packed_linear import PackedLinear
from optim.runtime.formats.schemes import Scheme
from optim.runtime.kernels import cpu_sparse

if TYPE_CHECKING:
    from optim.runtime.kernels.triton_gather import Gather

FEW = 4  # sequences decoded at once that each skip their own inputs; more run densely
SLICE = 1 << 20  # weights widened at a time


class SparseLinear(nn.Module):
    """y = W x + b, where decoding leaves out x_k with |x_k| <= `threshold`; float32 on a CPU."""

    def __init__(self, columns: "cpu_sparse.Columns | Gather", threshold: float) -> None:
        super().__init__()
        self.columns, self.threshold = columns, threshold
        self.calls = 0
        self.used: int | Tensor = 0

    def forward(self, x: Tensor) -> Tensor:
        """x `[B, T, in]` -> `[B, T, out]`; sparse where T is 1 and B is at most FEW."""
        if x.shape[1] > 1 or x.shape[0] > FEW:
            return dense(self.columns, x)
        rows = [self._one(row) for row in x[:, 0]]
        return rows[0].view(1, 1, -1) if len(rows) == 1 else torch.stack(rows).unsqueeze(1)

    def _one(self, x: Tensor) -> Tensor:
        y = self.columns(x, self.threshold)
        self.calls += 1
        self.used += self.columns.used
        return y

    @property
    def skipped_bytes(self) -> float:
        """Bytes of weights not read for a token, on average over the tokens decoded so far."""
        if not self.calls:
            return 0.0
        return self.columns.nbytes * (1 - float(self.used) / (self.calls * self.columns.inputs))


class MaskedLinear(nn.Module):
    """`inner`, with the same inputs set to zero as SparseLinear leaves out."""

    def __init__(self, inner: nn.Module, threshold: float) -> None:
        super().__init__()
        self.inner, self.threshold = inner, threshold

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1 and x.shape[0] <= FEW:
            x = torch.where(x.abs() <= self.threshold, 0, x)
        y: Tensor = self.inner(x)
        return y


def dense(columns: "cpu_sparse.Columns | Gather", x: Tensor) -> Tensor:
    """x `[..., in]` through all the columns: `[..., out]`."""
    rows, outputs = x.reshape(-1, x.shape[-1]), columns.outputs
    y = rows.new_zeros(rows.shape[0], outputs)
    step = max(1, SLICE // outputs)
    for start in range(0, columns.inputs, step):
        part = slice(start, min(start + step, columns.inputs))
        y.addmm_(rows[:, part], columns.wide(part).to(y.dtype))
    bias = columns.tensors.get("bias")
    return (y if bias is None else y + bias.to(y.dtype)).view(*x.shape[:-1], outputs)


def sparse_dense(weight: Tensor, bias: Tensor | None, threshold: float) -> SparseLinear | None:
    """A plain weight `[out, in]` as SparseLinear; None where no kernel reads it."""
    if weight.device.type == "cuda" and find_spec("triton"):
        layout = cpu_sparse.dense_layout(weight, bias)
        return SparseLinear(_on_gpu(weight.shape[0], layout, 0), threshold)
    fits = weight.device.type == "cpu" and weight.dtype in cpu_sparse.KINDS
    if not fits or not cpu_sparse.usable():
        return None
    return SparseLinear(cpu_sparse.linear(weight, bias), threshold)


def sparse_packed(linear: PackedLinear, threshold: float) -> SparseLinear | None:
    """A packed linear that is not prepared yet as SparseLinear; None where no kernel reads it."""
    scale = linear.weight_scale
    if scale is None or scale.dtype != torch.bfloat16 or not _readable(linear.scheme, scale.device):
        return None  # scales of another type would have to be rounded
    q, scale, zero = unpack(linear.stored(), linear.scheme, linear.name)
    if scale.device.type == "cuda":
        layout = cpu_sparse.packed_layout(q, scale, zero, linear.scheme, linear.bias)
        return SparseLinear(_on_gpu(q.shape[0], layout, linear.scheme.group_size), threshold)
    return SparseLinear(cpu_sparse.packed(q, scale, zero, linear.scheme, linear.bias), threshold)


def _readable(scheme: Scheme, device: torch.device) -> bool:
    if device.type == "cuda":
        group = scheme.group_size
        return bool(find_spec("triton")) and scheme.bits <= 4 and group in (16, 32, 64, 128, 256)
    return device.type == "cpu" and cpu_sparse.supports(scheme) and cpu_sparse.usable()


def _on_gpu(outputs: int, tensors: dict[str, Tensor], group: int) -> "Gather":
    from optim.runtime.kernels.triton_gather import Gather

    return Gather(outputs, tensors, group)
