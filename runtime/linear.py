"""Linears that are not packed, and how several become one."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLICE = 1 << 22  # weights widened at a time: 16 MB in fp32


class DenseLinear(nn.Module):
    """y = x W^T + b; `weight` `[out, in]` keeps its dtype, `x` `[..., in]` has the compute dtype.

    Where the two differ, the weight is widened in slices, never as a whole.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype == x.dtype:
            return F.linear(x, self.weight, self.bias)
        rows = max(1, SLICE // self.weight.shape[1])
        y = torch.cat([F.linear(x, w.to(x.dtype)) for w in torch.split(self.weight, rows)], -1)
        return y if self.bias is None else y.add_(self.bias)


class Joined(nn.Module):
    """Linears of different formats that read one input: outputs side by side."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], -1)
