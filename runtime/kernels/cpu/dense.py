"""A linear of bf16 weights, as they are or in bf12 planes, as the C step over all blocks reads it.

What it computes is `bf16.linear`, or `bf12.linear`, and the bias: the same sums bit for bit.
"""

import ctypes
from typing import ClassVar

import torch
from torch import Tensor

from optim.runtime.kernels.cpu.bf12 import CPlanes
from optim.runtime.kernels.door import Struct


class CDense(Struct):
    """`Dense` of optim.h."""

    NAME = "Dense"

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
        *((name, ctypes.c_void_p) for name in ("weight", "planes", "bias")),
    )


class Dense:
    """One linear `[out, in]`."""

    READ_AS: ClassVar[str] = "dense"

    def __init__(self, weight: Tensor | CPlanes, bias: Tensor | None) -> None:
        """`weight` bf16 `[out, in]`, or its planes; `bias` fp32 `[out]`."""
        self._dense = CDense()
        if isinstance(weight, CPlanes):
            self.outputs, self.inputs = weight.rows, weight.cols
            self._dense.planes, self._held = ctypes.addressof(weight), weight
        else:
            self.outputs, self.inputs = weight.shape
            self._dense.point("weight", weight, torch.bfloat16, weight.numel())
        self._dense.inputs, self._dense.outputs = self.inputs, self.outputs
        self._dense.point("bias", bias, torch.float32, self.outputs)
        self.biased = bias is not None
        self.address = ctypes.addressof(self._dense)
