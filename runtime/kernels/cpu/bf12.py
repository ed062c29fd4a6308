"""bf12 planes on a CPU: make them, read rows back, multiply for few tokens, through `bf12.c`.

`numba_bf12` has the first two for machines without a C compiler. The layout: formats/bf12.py;
`bf12.check` tries them.
"""

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from optim.runtime.kernels.compile import library, team, works
from optim.runtime.kernels.cpu import bf16
from optim.runtime.kernels.cpu.df11 import Array

FEW_TOKENS = bf16.FEW_TOKENS


class CPlanes(ctypes.Structure):
    """`Planes` of bf12.c."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("low", "high", "palette", "escapes", "at", "escaped")
        ),
        *((name, ctypes.c_int64) for name in ("rows", "cols")),
    )
    arrays: tuple[Array, ...]  # what the pointers point into


def c_planes(arrays: Mapping[str, Array], rows: int, cols: int) -> CPlanes:
    """The planes of one matrix for the functions here; keeps `arrays` alive."""
    made = CPlanes(rows=rows, cols=cols, **{k: array.ctypes.data for k, array in arrays.items()})
    made.arrays = tuple(arrays.values())
    return made


def usable() -> bool:
    """Whether these functions work here."""
    return works(load)


def count(weights: Array, high_bytes: Array) -> None:
    """Add to int64 `[256]` how often each high byte of uint16 weights comes."""
    load().optim_bf12_count(weights.ctypes.data, weights.size, high_bytes.ctypes.data)


def split(weights: Array, name: Array, first: int, planes: tuple[Array, ...]) -> int:
    """uint16 `[rows, cols]` into planes (low, high, at, escaped); returns the number of escapes.

    `name` uint8 `[256]`: each high byte's place in the palette, 16 for none; `first`: the index of
    the first weight, from which `at` counts.
    """
    low, high, at, escaped = (plane.ctypes.data for plane in planes)
    rows, cols = weights.shape
    made = load().optim_bf12_split(
        weights.ctypes.data, rows, cols, name.ctypes.data, low, high, first, at, escaped
    )
    return int(made)


def rows(planes: CPlanes, start: int, stop: int, out: Array) -> None:
    """Rows start..stop as uint16 `[stop - start, cols]`, into `out`."""
    load().optim_bf12_rows(ctypes.byref(planes), start, stop, out.ctypes.data)


def linear(x: Tensor, parts: Sequence[CPlanes]) -> Tensor:
    """x W^T: float32 `[tokens, in]`, matrices with `in` columns -> float32 `[tokens, all rows]`.

    Bit for bit what `bf16.linear` gives for the same weights.
    """
    x = x.contiguous()
    outputs = sum(part.rows for part in parts)
    y = torch.empty(x.shape[0], outputs)
    array = (CPlanes * len(parts))(*parts)
    threads = torch.get_num_threads()
    pointers = x.data_ptr(), y.data_ptr()
    if load().optim_bf12(array, len(parts), *pointers, outputs, x.shape[0], threads, team()):
        raise MemoryError
    return y


@cache
def load() -> ctypes.CDLL:
    """The compiled kernel. Raises NoKernel with the reason."""
    lib = library("bf12")
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    lib.optim_bf12_count.argtypes = [pointer, integer, pointer]
    lib.optim_bf12_count.restype = None
    lib.optim_bf12_split.argtypes = [
        *(pointer, integer, integer, pointer, pointer, pointer, integer, pointer, pointer)
    ]
    lib.optim_bf12_split.restype = integer
    lib.optim_bf12_rows.argtypes = [pointer, integer, integer, pointer]
    lib.optim_bf12_rows.restype = None
    lib.optim_bf12.argtypes = [
        *(pointer, integer, pointer, pointer, integer, integer),
        *(ctypes.c_int, pointer),
    ]
    return lib
