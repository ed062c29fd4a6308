"""DFloat11's exponent stream on a CPU: count, encode, decode, through `df11.c`.

`numba_df11` has the same three functions for machines without a C compiler. All work on numpy
arrays: weights are uint16 views of bf16, `exponent = w >> 7 & 255`, the rest sign and mantissa.
"""

import ctypes
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch

from optim.runtime.formats.dfloat11 import BLOCK_BITS, CHILD
from optim.runtime.kernels.compile import NoKernel, library, team, works
from optim.runtime.kernels.door import Array, Struct, WrongTensor, array_address

WINDOW_BITS = 64


class State(Struct):
    """`Writer` of df11.c: the unfinished window, and how far the stream has come."""

    NAME = "Writer"

    _fields_ = (
        ("word", ctypes.c_uint64),
        *((name, ctypes.c_int64) for name in ("bits", "window", "element")),
    )


@dataclass(slots=True)
class Stream:
    """A stream being written. `gaps` uint8, one a window; `positions` uint32, one a block."""

    codes: Array
    lengths: Array
    gaps: Array
    positions: Array
    state: State = field(default_factory=State)


def count(weights: Array, exponents: Array, rest: Array) -> None:
    """Add to int64 `[256]` each how often every exponent and every rest comes."""
    counts = [array_address(array, np.int64, 256, write=True) for array in (exponents, rest)]
    load().optim_df11_count(array_address(weights, np.uint16, weights.size), weights.size, *counts)


def encode(weights: Array, stream: Stream) -> tuple[Array, Array]:
    """Append `weights`: (finished bytes of the stream, sign and mantissa), both uint8."""
    size, state = weights.size, stream.state
    words = np.empty(size // 2 + 2, np.uint64)
    rest = np.empty(size, np.uint8)
    gaps, positions = stream.gaps.size, stream.positions.size
    room = min(gaps, positions * BLOCK_BITS // WINDOW_BITS, state.window + words.size)
    written = load().optim_df11_encode(
        array_address(weights, np.uint16, size),
        size,
        array_address(stream.codes, np.uint32, 256),
        array_address(stream.lengths, np.uint8, 256),
        ctypes.byref(state),
        array_address(words, np.uint64, words.size, write=True),
        array_address(rest, np.uint8, size, write=True),
        array_address(stream.gaps, np.uint8, gaps, write=True),
        array_address(stream.positions, np.uint32, positions, write=True),
        room,
    )
    if written < 0:
        raise WrongTensor(f"there is room for {room} windows, and more came")
    return words[:written].view(np.uint8), rest


def decode(
    stream: Array, bounds: tuple[Array, Array, Array], elements: Array, rest: Array, walk: Array
) -> tuple[Array, int]:
    """The weights uint16 of some blocks, and the first block that does not hold, or -1.

    `stream` uint8; `bounds` int64 `[blocks]`: the first bit of each block, the least and the
    largest bit at which its last code may end; `elements` int64 `[blocks + 1]` where in `rest` each
    begins; `walk` uint16 `[nodes, 256]` of dfloat11.
    """
    out, blocks = np.empty(rest.size, np.uint16), elements.size - 1
    steps, children = np.diff(elements), walk[walk >= CHILD] - np.uint16(CHILD)
    if elements[-1] != rest.size or (steps < 0).any() or (steps > BLOCK_BITS).any():
        raise WrongTensor(f"blocks of {steps.min()} to {steps.max()} weights, {rest.size} in all")
    if (bounds[0] < 0).any() or (children >= len(walk)).any():
        raise WrongTensor("a block before the stream, or a table that is not there")
    bad = load().optim_df11_decode(
        array_address(stream, np.uint8, stream.size),
        stream.size,
        *(array_address(array, np.int64, blocks) for array in bounds),
        array_address(elements, np.int64, blocks + 1),
        blocks,
        array_address(rest, np.uint8, rest.size),
        array_address(out, np.uint16, rest.size, write=True),
        array_address(walk, np.uint16, walk.size),
        torch.get_num_threads(),
        team(),
    )
    return out, int(bad)


@cache
def load() -> ctypes.CDLL:
    """The compiled kernel. Raises NoKernel with the reason."""
    lib = library("df11", structs=(State,))
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    lib.optim_df11_count.argtypes = [pointer, integer, pointer, pointer]
    lib.optim_df11_count.restype = None
    lib.optim_df11_encode.argtypes = [pointer, integer, *[pointer] * 7, integer]
    lib.optim_df11_encode.restype = integer
    blocks: list[type[Any]] = [pointer, integer, *[pointer] * 4, integer]
    lib.optim_df11_decode.argtypes = [*blocks, *[pointer] * 3, ctypes.c_int, pointer]
    lib.optim_df11_decode.restype = integer
    return lib


def usable() -> bool:
    """Whether the C code works here."""
    return works(load)


@cache
def check() -> str:
    """Decodes 300 codes of two bits that the plain rule for them has made. Raises NoKernel."""
    exponents = np.arange(300) % 4 + 120
    stream = np.packbits((exponents[:, None] - 120 >> np.array([1, 0]) & 1).astype(np.uint8))
    rest = (np.arange(300) * 7 % 256).astype(np.uint8)
    walk = np.repeat(np.arange(4, dtype=np.uint16) + (2 << 8 | 120), 64)[None].copy()
    bounds = np.array([0]), np.array([600]), np.array([600])
    made, bad = decode(stream, bounds, np.array([0, 300]), rest, walk)
    wanted = (rest.astype(int) & 0x80) << 8 | exponents << 7 | rest & 0x7F
    if bad != -1 or not (made == wanted).all():
        raise NoKernel("it disagrees with the plain rule")
    return "compiled here"
