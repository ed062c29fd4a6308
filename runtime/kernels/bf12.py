"""bf12 planes (formats/bf12.py) in memory: made of a bf16 matrix, and read back row by row.

In C where there is a compiler (bf12.py), else in numba.
"""

import math
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from optim.runtime.formats.bf12 import PALETTE, width
from optim.runtime.kernels.compile import NoKernel
from optim.runtime.kernels.cpu import bf12
from optim.runtime.kernels.cpu import bf16 as cpu_bf16
from optim.runtime.kernels.door import Array


def codec() -> ModuleType:
    """`bf12`, or `numba_bf12` where there is no C compiler."""
    if bf12.usable():
        return bf12
    from optim.runtime.kernels.cpu import numba_bf12

    return numba_bf12


def words(weights: Tensor) -> Array:
    """A bf16 tensor as uint16, without a copy where it is contiguous."""
    array: Array = weights.contiguous().view(torch.int16).numpy().view(np.uint16)
    return array


@dataclass(slots=True)
class Planes:
    """One matrix `[rows, cols]`, or some rows of it; numpy arrays as in formats/bf12.py."""

    low: Array
    high: Array
    palette: Array
    at: Array
    escaped: Array
    escapes: Array = field(init=False)
    """int32 `[rows + 1]`: where each row's escapes begin."""
    c: bf12.CPlanes = field(init=False)

    def __post_init__(self) -> None:
        """`at` must rise and lie inside."""
        rows, cols = self.low.shape
        edges = np.arange(rows + 1, dtype=np.int64) * cols
        self.escapes = np.searchsorted(self.at, edges).astype(np.int32)
        names = ("low", "high", "palette", "escapes", "at", "escaped")
        self.c = bf12.c_planes({name: getattr(self, name) for name in names}, rows, cols)

    @property
    def nbytes(self) -> int:
        held = (self.low, self.high, self.palette, self.at, self.escaped, self.escapes)
        return sum(int(array.nbytes) for array in held)

    @property
    def shape(self) -> tuple[int, int]:
        return self.low.shape[0], self.low.shape[1]

    def __getitem__(self, rows: slice) -> Tensor:
        """Some rows: bf16 `[n, cols]`."""
        start, stop, step = rows.indices(self.low.shape[0])
        assert step == 1
        out = np.empty((stop - start, self.low.shape[1]), np.uint16)
        kernel = codec()
        kernel.rows(self.c if kernel is bf12 else self, start, stop, out)
        return torch.from_numpy(out.view(np.int16)).view(torch.bfloat16)


class Splitter:
    """Makes planes of a tensor that comes some rows at a time, its high bytes counted before."""

    def __init__(self, counts: Array, shape: tuple[int, ...]) -> None:
        """`counts` int64 `[256]` of the whole tensor's high bytes; `shape` its own."""
        common = sorted(range(256), key=lambda byte: (-counts[byte], byte))[:PALETTE]
        self.palette = np.array(sorted(common), np.uint8)
        self.escapes = int(counts.sum() - counts[common].sum())
        self.shape, self.cols = shape, shape[-1]
        self._name = np.full(256, PALETTE, np.uint8)
        self._name[self.palette] = np.arange(PALETTE)
        self._first = 0

    def sizes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of each plane."""
        shapes = {
            "low": self.shape,
            "high": (*self.shape[:-1], width(self.cols)),
            "palette": (PALETTE,),
            "at": (self.escapes,),
            "escaped": (self.escapes,),
        }
        return {
            k: (torch.int32 if k == "at" else torch.uint8, shape) for k, shape in shapes.items()
        }

    def bits(self, _tally: object) -> float:
        """Bits a weight of the whole tensor."""
        total = sum(math.prod(shape) * t.itemsize for t, shape in self.sizes().values())
        return 8 * total / max(math.prod(self.shape), 1)

    def push(self, weights: Tensor) -> dict[str, Array]:
        """The next rows, bf16 `[..., cols]`: what to append to each plane but the palette."""
        w = words(weights).reshape(-1, self.cols)
        low = np.empty(w.shape, np.uint8)
        high = np.empty((len(w), width(self.cols)), np.uint8)
        most = min(self.escapes, w.size)
        at, escaped = np.empty(most, np.int32), np.empty(most, np.uint8)
        found = codec().split(w, self._name, self._first, (low, high, at, escaped))
        self._first += w.size
        return {"low": low, "high": high, "at": at[:found], "escaped": escaped[:found]}

    def finish(self) -> dict[str, Array]:
        """The palette."""
        return {"palette": self.palette}


def count(weights: Tensor, high: Array) -> None:
    """Add to int64 `[256]` how often each high byte of a bf16 tensor comes."""
    codec().count(words(weights), high)


def planes_of(weight: Tensor) -> Planes:
    """The planes of a bf16 matrix `[rows, cols]`."""
    counts = np.zeros(256, np.int64)
    count(weight, counts)
    splitter = Splitter(counts, tuple(weight.shape))
    return Planes(palette=splitter.palette, **splitter.push(weight))


@cache
def check() -> str:
    """Compares the product with that of the plain bf16 kernel. Raises NoKernel."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(71, 133, generator=generator).to(torch.bfloat16)
    weight[3, 5] = 3e38  # an escape
    x = torch.randn(3, 133, generator=generator)
    got = bf12.linear(x, [planes_of(weight).c])
    if not torch.equal(got, cpu_bf16.linear(x, weight)):
        raise NoKernel("it disagrees with the bf16 kernel")
    return "compiled here"
