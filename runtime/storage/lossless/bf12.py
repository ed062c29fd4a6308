"""Layout bf12: the matrices of a file (formats/bf12.py), read in parts; and how one is written."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optim.recipes.errors import OptimError
from optim.runtime.formats.bf12 import MOST_WEIGHTS, PALETTE, PIECES, width
from optim.runtime.kernels.bf12 import Planes, Splitter, count
from optim.runtime.storage.lossless.dfloat11_encoder import Counts
from optim.runtime.storage.lossless.layout import Places, Read, ShapeOf, damaged
from optim.runtime.storage.tensors import TensorInfo

MOST_ESCAPES = 0.01  # of a matrix: beyond, bf12 is no gain and it stays bf16


class Bf12:
    """See layout.Layout. A unit is one tensor, under its own name."""

    key, title, expected_bits = "bf12_config", "bf12", 12.02
    prefix, pieces, joins = "bf12_", PIECES, False

    def units(
        self, names: Mapping[str, TensorInfo], config: Mapping[str, Any], shapes: Mapping[str, Any]
    ) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Every matrix; config.json and manifest say nothing of them."""
        for name in names:
            unit, _, suffix = name.rpartition(".")
            if suffix == f"{self.prefix}{PIECES[0]}":
                yield unit, (unit,)

    def open(
        self,
        unit: str,
        tensors: Sequence[str],
        infos: Mapping[str, TensorInfo],
        read: Read,
        shape_of: ShapeOf,
    ) -> tuple["Matrix", Places]:
        """The matrix `unit`, which knows its own shape."""
        matrix = Matrix(unit, infos, read)
        return matrix, [(0, matrix.shape)]

    def config(self, units: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """The names of the pieces say all."""
        return {"version": 1}

    def tally(self) -> "Tally":
        """High bytes are what is coded."""
        return Tally()

    def encoder(self, tallies: Sequence["Tally"], shapes: Sequence[tuple[int, ...]]) -> Splitter:
        """The planes of one matrix."""
        ((tally,), (shape,)) = tallies, shapes
        return Splitter(tally.high, shape)


class Tally(Counts):
    """`high` counts high bytes, int64 `[256]`; exponents are counted for the limit."""

    def __init__(self) -> None:
        super().__init__()
        self.high = np.zeros(256, np.int64)

    def add(self, weights: Tensor) -> None:
        """Count a bf16 tensor."""
        super().add(weights)
        count(weights, self.high)

    @property
    def unfit(self) -> str:
        """Why it stays bf16: too many high bytes beside the palette. Empty if it does not."""
        escapes = 1 - np.sort(self.high)[-PALETTE:].sum() / self.high.sum()
        return "" if escapes <= MOST_ESCAPES else f"{escapes:.1%} of its weights are escapes"


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
    return damaged(f"{name}.bf12_{piece}", why)
