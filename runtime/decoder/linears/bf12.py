"""A linear whose bf16 weight is held as bf12 planes: three quarters of the bytes, the same numbers.

On a CPU that computes in float32 every output is bit for bit that of a bf16 `DenseLinear`: a row's
sum runs in the same order, and for many tokens the same slices are widened. On a GPU the fused
kernel adds in another order; `exact` expands the weight and uses the plain product.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from optim.runtime.decoder.linears.base import Linear, Table
from optim.runtime.decoder.linears.dense import FEW, DenseLinear, many
from optim.runtime.decoder.linears.source import Source
from optim.runtime.kernels.bf12 import Planes, planes_of
from optim.runtime.kernels.cpu import bf12 as cpu_bf12
from optim.runtime.kernels.cpu.decode import Reader
from optim.runtime.kernels.cpu.dense import Dense

GAINS: dict[str, float | None] = {"cpu": 1.19, "cuda": None}
"""Kind of device: how much faster planes decode a whole model than bf16 (docs/lossless.md, one
thread with AVX2), None where it was never measured."""
WORTH = 1.05  # below, planes save memory and nothing else


class PlaneLinear(Linear):
    """y = x W^T + b, `x` `[..., in]`; also a table of rows: `linear[ids]` is bf16 `[..., in]`."""

    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, exact: bool = False) -> None:
        """`weight` bf16 `[out, in]` on the device where the linear is to run."""
        super().__init__()
        self.register_buffer("bias", bias)
        self.exact = exact
        self.out_features, self.in_features = weight.shape
        self.planes: Planes | Any
        if weight.device.type == "cpu":
            self.planes = planes_of(weight)
        else:
            from optim.runtime.kernels.triton.bf12 import Weight

            self.planes = Weight(weight)

    @classmethod
    def claims(cls, source: Source, names: Sequence[str]) -> bool:
        """bf16 weights of a model packed without loss, where a kernel reads planes."""
        checkpoint = source.checkpoint
        if checkpoint.layout is None or source.form == "bf16" or not runs_here(source.device):
            return False
        infos = [checkpoint.tensors.get(f"{name}.weight") for name in names]
        plain = all(info is not None and info.dtype == torch.bfloat16 for info in infos)
        return plain and source.alike(names, "bias")

    @classmethod
    def load(cls, source: Source, names: Sequence[str], below: float | None = None) -> Linear:
        """See Kind. Planes cannot be skipped: with `below` the weight is held as it was."""
        if below is not None:
            return DenseLinear.load(source, names, below)
        weights = [source.tensor(f"{name}.weight") for name in names]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        del weights
        return cls(weight, source.bias(names, source.dtype), exact=source.form == "exact")

    @property
    def nbytes(self) -> int:
        return int(self.planes.nbytes)

    @property
    def alike(self) -> int:
        return FEW if isinstance(self.planes, Planes) else 1

    @property
    def table(self) -> Table:
        return self

    @property
    def c_reader(self) -> Reader | None:
        held = self.planes
        return Reader(Dense(held.c, self.bias)) if isinstance(held, Planes) else None

    @property
    def weight(self) -> Tensor:
        """The weight itself, bf16 `[out, in]`: made anew each time."""
        whole: Tensor = self.planes[:]
        return whole

    def __getitem__(self, ids: Tensor) -> Tensor:
        """Rows of the weight, bf16 `[..., in]`, for int64 `ids` of any shape."""
        if not isinstance(self.planes, Planes):
            taken: Tensor = self.planes.take(ids)
            return taken
        rows = [self.planes[i : i + 1] for i in ids.reshape(-1).tolist()]
        return torch.cat(rows).view(*ids.shape, -1)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = self._product(rows).view(*x.shape[:-1], -1)
        return y if self.bias is None else y.add_(self.bias)

    def _product(self, x: Tensor) -> Tensor:
        if self.exact and x.dtype == torch.bfloat16:
            return F.linear(x, self.weight)
        if not isinstance(self.planes, Planes):
            y: Tensor = self.planes(x)
            return y
        if x.shape[0] > FEW:
            return many(x, self.planes)
        parts = [
            cpu_bf12.linear(part.float(), [self.planes.c])
            for part in torch.split(x, cpu_bf12.FEW_TOKENS)
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(x.dtype)


def runs_here(device: torch.device) -> bool:
    """Whether planes are worth holding on `device`: without a kernel bf16 itself is faster."""
    return device.type != "cpu" or cpu_bf12.usable()


def prospect(device: torch.device) -> tuple[bool, str]:
    """Whether weights packed without loss are known to run faster than bf16 there, in words."""
    if not runs_here(device):
        return False, "no C compiler: decoded at load and held as bf16, which saves disk alone"
    gain = GAINS.get(device.type)
    if gain is None:
        return False, "never timed on such a device: take them as a saving of memory alone"
    if gain < WORTH:
        return False, f"{gain:.2f}x bf16 where it was measured: they save memory alone"
    return True, f"{gain:.2f}x bf16 where it was measured (`optim bench PACKED` measures it here)"
