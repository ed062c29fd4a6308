"""Packed weights anywhere, in torch alone: unpack a tile of rows, multiply, next tile.

The reference of every kernel, and what runs where none of them can. Memory is the stored bits plus
one tile; time is that of unpacking all weights on every call.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from optim.runtime.formats.bits import pack_rows, unpack_rows
from optim.runtime.formats.pack_quantized import dequantize
from optim.runtime.formats.schemes import Scheme

TILE = 1 << 21  # weights unpacked at a time: 8 MB in float32


def supports(scheme: Scheme, device: torch.device) -> bool:
    """Everything, everywhere."""
    return True


class Weight:
    """One linear `[out, in]` as dense bits; call it with `[tokens, in]`."""

    def __init__(
        self, q: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, bias: Tensor | None
    ) -> None:
        self.outputs, self.inputs = q.shape
        self.scheme, self.bias = scheme, bias
        self.words, self.scale, self.zero = pack_rows(q, scheme.bits), scale, zero

    @property
    def nbytes(self) -> int:
        held = (self.words, self.scale, self.zero, self.bias)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """The weight's rows start..stop: [stop - start, in] in `dtype`."""
        q = unpack_rows(self.words[start:stop], self.scheme.bits, self.inputs)
        zero = None if self.zero is None else self.zero[start:stop]
        return dequantize(q, self.scale[start:stop], zero, self.scheme, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """`[tokens, in]` -> `[tokens, out]` in the dtype of x, bias included."""
        y = by_tiles(x, self.outputs, lambda start, stop: self.rows(start, stop, x.dtype))
        return y if self.bias is None else y.add_(self.bias.to(y.dtype))


def by_tiles(x: Tensor, outputs: int, rows: Callable[[int, int], Tensor]) -> Tensor:
    """x W^T for a weight that `rows(start, stop)` gives a part of, in the dtype of x."""
    y = x.new_empty(x.shape[0], outputs)
    step = max(64, TILE // x.shape[1])
    for start in range(0, outputs, step):
        stop = min(outputs, start + step)
        y[:, start:stop] = F.linear(x, rows(start, stop))
    return y
