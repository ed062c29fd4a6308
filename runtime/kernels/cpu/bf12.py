"""bf12 planes on a CPU: make them, read rows back, multiply for few tokens, through `bf12.c`.

`numba_bf12` has the first two for machines without a C compiler. The layout: formats/bf12.py;
`bf12.check` tries them.
"""

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optim.runtime.formats.bf12 import PALETTE, width
from optim.runtime.kernels.compile import library, team, works
from optim.runtime.kernels.cpu import bf16
from optim.runtime.kernels.door import Array, Struct, WrongTensor, address, array_address

FEW_TOKENS = bf16.FEW_TOKENS


class CPlanes(Struct):
    """`Planes` of bf12.c."""

    NAME = "Planes"

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("low", "high", "palette", "escapes", "at", "escaped")
        ),
        *((name, ctypes.c_int64) for name in ("rows", "cols")),
    )


def c_planes(arrays: Mapping[str, Array], rows: int, cols: int) -> CPlanes:
    """The planes of one matrix for the functions here; keeps `arrays` alive.

    Raises WrongTensor unless the escapes of every row rise and lie in it.
    """
    escapes, at = arrays["escapes"], arrays["at"]
    made = CPlanes(rows=rows, cols=cols)
    made.point_array("low", arrays["low"], np.uint8, rows * cols)
    made.point_array("high", arrays["high"], np.uint8, rows * width(cols))
    made.point_array("palette", arrays["palette"], np.uint8, PALETTE)
    made.point_array("escapes", escapes, np.int32, rows + 1)
    made.point_array("at", at, np.int32, at.size)
    made.point_array("escaped", arrays["escaped"], np.uint8, at.size)
    edges = np.arange(rows + 1, dtype=np.int64) * cols
    inside = at.size == 0 or (at[0] >= 0 and at[-1] < rows * cols and (at[1:] > at[:-1]).all())
    if not inside or not (escapes == np.searchsorted(at, edges)).all():
        raise WrongTensor(f"escapes of a matrix [{rows}, {cols}] do not rise, row by row")
    return made


def usable() -> bool:
    """Whether these functions work here."""
    return works(load)


def count(weights: Array, high_bytes: Array) -> None:
    """Add to int64 `[256]` how often each high byte of uint16 weights comes."""
    counts = array_address(high_bytes, np.int64, 256, write=True)
    load().optim_bf12_count(array_address(weights, np.uint16, weights.size), weights.size, counts)


def split(weights: Array, name: Array, first: int, planes: tuple[Array, ...]) -> int:
    """uint16 `[rows, cols]` into planes (low, high, at, escaped); returns the number of escapes.

    `name` uint8 `[256]`: each high byte's place in the palette, 16 for none; `first`: the index of
    the first weight, from which `at` counts. `at` and `escaped` have room for all of them.
    """
    rows, cols = weights.shape
    low, high, at, escaped = planes
    made = load().optim_bf12_split(
        array_address(weights, np.uint16, rows * cols),
        rows,
        cols,
        array_address(name, np.uint8, 256),
        array_address(low, np.uint8, rows * cols, write=True),
        array_address(high, np.uint8, rows * width(cols), write=True),
        first,
        array_address(at, np.int32, at.size, write=True),
        array_address(escaped, np.uint8, at.size, write=True),
        at.size,
    )
    if made < 0:
        raise WrongTensor(f"there is room for {at.size} escapes of [{rows}, {cols}], and more came")
    return int(made)


def rows(planes: CPlanes, start: int, stop: int, out: Array) -> None:
    """Rows start..stop as uint16 `[stop - start, cols]`, into `out`."""
    if not 0 <= start <= stop <= planes.rows:
        raise WrongTensor(f"rows {start} to {stop} of {planes.rows}")
    place = array_address(out, np.uint16, (stop - start) * planes.cols, write=True)
    load().optim_bf12_rows(ctypes.byref(planes), start, stop, place)


def linear(x: Tensor, parts: Sequence[CPlanes]) -> Tensor:
    """x W^T: float32 `[tokens, in]`, matrices with `in` columns -> float32 `[tokens, all rows]`.

    Bit for bit what `bf16.linear` gives for the same weights.
    """
    x = x.contiguous()
    tokens, inputs = x.shape
    outputs = sum(part.rows for part in parts)
    if any(part.cols != inputs for part in parts):
        raise WrongTensor(f"{inputs} inputs for columns {[part.cols for part in parts]}")
    y = torch.empty(tokens, outputs)
    array = (CPlanes * len(parts))(*parts)
    threads = torch.get_num_threads()
    places = address(x, torch.float32, tokens * inputs), address(y, torch.float32, tokens * outputs)
    if load().optim_bf12(array, len(parts), *places, outputs, tokens, threads, team()):
        raise MemoryError
    return y


@cache
def load() -> ctypes.CDLL:
    """The compiled kernel. Raises NoKernel with the reason."""
    lib = library("bf12", structs=(CPlanes,))
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    lib.optim_bf12_count.argtypes = [pointer, integer, pointer]
    lib.optim_bf12_count.restype = None
    planes: list[type[Any]] = [*[pointer] * 3, integer, pointer, pointer, integer]
    lib.optim_bf12_split.argtypes = [pointer, integer, integer, *planes]
    lib.optim_bf12_split.restype = integer
    lib.optim_bf12_rows.argtypes = [pointer, integer, integer, pointer]
    lib.optim_bf12_rows.restype = None
    lib.optim_bf12.argtypes = [
        *(pointer, integer, pointer, pointer, integer, integer),
        *(ctypes.c_int, pointer),
    ]
    return lib
