"""Linears that leave out small inputs when they decode, and read whole prompts densely.

The weight is held input by input (kernels/cpu/skip_dense.py, skip_int4.py, triton/skip.py) and once
only: for many tokens 16 bits are widened a slice of inputs at a time. Where no kernel can do it, or
where an input's weights are too short a run of memory to be left out with profit, the inputs are
set to zero and the dense linear runs: the same result, at the dense speed.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optim.runtime.decoder.linears.base import FEW, Linear, added
from optim.runtime.decoder.linears.gathered import gather_columns
from optim.runtime.formats.schemes import Scheme
from optim.runtime.kernels.cpu import skip_dense, skip_int4
from optim.runtime.kernels.cpu.decode import Reader

if TYPE_CHECKING:
    from optim.runtime.kernels.triton.skip import Gather

    Columns = skip_dense.Columns | skip_int4.Columns | Gather

SLICE = 1 << 20  # weights widened at a time
SHORT = 1536  # bytes of an input's 4-bit weights below which reading all was as fast as skipping


class SparseLinear(Linear):
    """y = W x + b, where decoding leaves out x_k with |x_k| <= `threshold`; float32 on a CPU."""

    def __init__(self, columns: "Columns", threshold: float) -> None:
        super().__init__()
        self.columns, self.threshold = columns, threshold
        self.in_features, self.out_features = columns.inputs, columns.outputs

    def forward(self, x: Tensor) -> Tensor:
        """x `[B, T, in]` -> `[B, T, out]`; sparse where T is 1 and B is at most FEW."""
        if x.shape[1] > 1 or x.shape[0] > FEW:
            return dense(self.columns, x)
        rows = [self.columns(row, self.threshold) for row in x[:, 0]]
        return rows[0].view(1, 1, -1) if len(rows) == 1 else torch.stack(rows).unsqueeze(1)

    @property
    def nbytes(self) -> int:
        return self.columns.nbytes

    @property
    def skipped_bytes(self) -> float:
        columns = self.columns
        if not columns.calls:
            return 0.0
        return columns.nbytes * (1 - float(columns.used) / (columns.calls * columns.inputs))

    @property
    def recordable(self) -> bool:
        return False

    @property
    def c_reader(self) -> Reader | None:
        held = self.columns
        return Reader(held, self.threshold) if isinstance(held, skip_int4.Columns) else None

    @property
    def c_columns(self) -> skip_dense.Columns | None:
        return self.columns if isinstance(self.columns, skip_dense.Columns) else None

    def with_inputs(self, columns: Tensor, shift: Tensor | None = None) -> Linear:
        held, bias = self.columns, added(self.columns.bias, shift)
        if isinstance(held, skip_int4.Columns):
            return SparseLinear(gather_columns(held, columns, bias), skip_int4.NOTHING)
        if isinstance(held, skip_dense.Columns):
            some = skip_dense.Columns(held.outputs, held.weight[columns], bias)
            return SparseLinear(some, skip_int4.NOTHING)
        return super().with_inputs(columns, shift)


def dense(columns: "Columns", x: Tensor) -> Tensor:
    """x `[..., in]` through all the columns: `[..., out]`."""
    rows, outputs = x.reshape(-1, x.shape[-1]), columns.outputs
    if isinstance(columns, skip_int4.Columns):
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
        from optim.runtime.kernels.triton import skip

        tensors = skip.dense_layout(weight, bias)
        return SparseLinear(skip.Gather(weight.shape[0], tensors, 0), threshold)
    if not skip_dense.reads(weight):
        return None
    return SparseLinear(skip_dense.linear(weight, bias), threshold)


Opened = tuple[Tensor, Tensor, Tensor | None]
"""Integers, scales and zero points, as `unpack` gives them."""


def sparse_packed(
    unpack: Callable[[], Opened],
    scale: Tensor | None,
    scheme: Scheme,
    bias: Tensor | None,
    threshold: float,
) -> SparseLinear | None:
    """A packed weight, unpacked if it is worth it, as SparseLinear; None where that does not pay.

    `scale` is the stored one.
    """
    if scale is None or scale.dtype != torch.bfloat16 or not _readable(scheme, scale.device):
        return None  # scales of another type would have to be rounded
    q, scale, zero = unpack()
    short = scale.device.type == "cpu" and q.shape[0] // 2 < SHORT
    if short and threshold != skip_int4.NOTHING:
        return None
    parts = q, scale, zero, scheme, bias
    if scale.device.type == "cuda":
        from optim.runtime.kernels.triton import skip as skip

        tensors, group = skip.int4_layout(*parts), scheme.group_size
        return SparseLinear(skip.Gather(q.shape[0], tensors, group), threshold)
    lines = skip_int4.NARROW if threshold == skip_int4.NOTHING else skip_int4.LINES
    return SparseLinear(skip_int4.packed(*parts, lines), threshold)


def _readable(scheme: Scheme, device: torch.device) -> bool:
    if scheme.offset:
        return False
    if device.type == "cuda":
        group = scheme.group_size
        return bool(find_spec("triton")) and scheme.bits <= 4 and group in (16, 32, 64, 128, 256)
    return device.type == "cpu" and skip_int4.supports(scheme) and skip_int4.usable()
