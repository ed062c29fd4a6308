"""bf12: bf16 without loss at a fixed 12 bits a weight, made to be computed with.

Of a bf16's two bytes the low one (an exponent bit, the mantissa) is noise and is kept as it is. The
high one (sign, 7 exponent bits) takes few values: 4 bits name one of the 16 commonest, the
*palette*; the few weights with another are *escapes*, kept in a list. Any bf16 can be held.

    low     uint8 [rows, cols]     high    uint8 [rows, width]: 64 names in 32 bytes, the first
    palette uint8 [16]                     32 in the low halves; a row's last r < 64 likewise
    at      int32 [e], rising: row * cols + column     escaped uint8 [e]: the high byte there
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.kernels import cpu_bf12
from optim.runtime.kernels.cpu_df11 import Array
from optim.runtime.tensor_files import TensorInfo

PALETTE, GROUP = 16, 64
PIECES = ("low", "high", "palette", "at", "escaped")
SUFFIXES = tuple(f"bf12_{piece}" for piece in PIECES)
MOST_WEIGHTS = 2**31 - 1  # `at` is int32

Read = Callable[[str, int, int], Array]
"""Bytes `start`..`stop` of one of a matrix's tensors."""


def codec() -> ModuleType:
    """`cpu_bf12`, or `numba_bf12` where there is no C compiler."""
    if cpu_bf12.usable():
        return cpu_bf12
    from optim.runtime.kernels import numba_bf12

    return numba_bf12


def width(cols: int) -> int:
    """Bytes of a row's names."""
    return cols // GROUP * (GROUP // 2) + (cols % GROUP + 1) // 2


def words(weights: Tensor) -> Array:
    """A bf16 tensor as uint16, without a copy where it is contiguous."""
    array: Array = weights.contiguous().view(torch.int16).numpy().view(np.uint16)
    return array


@dataclass(slots=True)
class Planes:
    """One matrix `[rows, cols]`, or some rows of it; numpy arrays as at the top of this file."""

    low: Array
    high: Array
    palette: Array
    at: Array
    escaped: Array
    escapes: Array = field(init=False)
    """int32 `[rows + 1]`: where each row's escapes begin."""
    c: cpu_bf12.CPlanes = field(init=False)

    def __post_init__(self) -> None:
        """`at` must rise and lie inside."""
        rows, cols = self.low.shape
        edges = np.arange(rows + 1, dtype=np.int64) * cols
        self.escapes = np.searchsorted(self.at, edges).astype(np.int32)
        names = ("low", "high", "palette", "escapes", "at", "escaped")
        self.c = cpu_bf12.c_planes({name: getattr(self, name) for name in names}, rows, cols)

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
        kernel.rows(self.c if kernel is cpu_bf12 else self, start, stop, out)
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

    def bits(self, counts: Array) -> float:
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


class Matrix:
    """A stored matrix, read in parts; OptimError (2) naming the tensor if it cannot be true."""

    def __init__(self, name: str, infos: Mapping[str, TensorInfo], read: Read) -> None:
        """`infos` and `read` by the names of PIECES."""
        self.name, self._read = name, read
        dtypes = {piece: torch.int32 if piece == "at" else torch.uint8 for piece in PIECES}
        for piece, dtype in dtypes.items():
            if piece not in infos or infos[piece].dtype != dtype:
                raise _damaged(name, piece, f"it is missing, or not {dtype}")
        self.shape = infos["low"].shape
        self.cols = self.shape[-1] if self.shape else 0
        self.size = math.prod(self.shape)
        rows = self.size // max(self.cols, 1)
        escapes = math.prod(infos["at"].shape)
        wanted = {"high": rows * width(self.cols), "palette": PALETTE, "escaped": escapes}
        for piece, size in wanted.items():
            if math.prod(infos[piece].shape) != size or not 0 < self.size <= MOST_WEIGHTS:
                raise _damaged(name, piece, f"it has shape {list(infos[piece].shape)}")
        self.palette = read("palette", 0, PALETTE)
        self.at, self.escaped = read("at", 0, 4 * escapes).view("<i4"), read("escaped", 0, escapes)
        rises = bool((np.diff(self.at.astype(np.int64)) > 0).all())
        if escapes and (not rises or self.at[0] < 0 or self.at[-1] >= self.size):
            raise _damaged(name, "at", "it does not rise from 0 to the last weight")

    def planes(self, start: int, stop: int) -> Planes:
        """Rows start..stop."""
        low = self._read("low", start * self.cols, stop * self.cols).reshape(-1, self.cols)
        step = width(self.cols)
        high = self._read("high", start * step, stop * step).reshape(-1, step)
        a, b = np.searchsorted(self.at, (start * self.cols, stop * self.cols))
        at = (self.at[a:b] - np.int32(start * self.cols)).astype(np.int32)
        return Planes(low, high, self.palette, at, np.ascontiguousarray(self.escaped[a:b]))

    def decode(self, first: int, count: int) -> Tensor:
        """`count` weights from element `first` on: bf16 `[count]`."""
        start, stop = first // self.cols, -(-(first + count) // self.cols)
        rows = self.planes(start, stop)[:].view(-1)
        return rows[first - start * self.cols :][:count]


def _damaged(name: str, piece: str, why: str) -> OptimError:
    fix = "fetch or pack the model again"
    return OptimError(f"{name}.bf12_{piece} is damaged: {why}", fix, USAGE)
