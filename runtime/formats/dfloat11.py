"""Read DFloat11 (arXiv 2504.11651; the format of LeanModels' package 0.5.0): bf16 without loss.

A bf16 is sign, 8 exponent bits, 7 mantissa bits. Trained weights use few exponents, so those are
Huffman coded; sign and mantissa stay a byte. A *unit* is a module whose linears are coded one after
the other. Its tensors, all uint8 but the last:

    luts [rows + 1, 256]     decode tables, and the length of each exponent's code
    encoded_exponent [bytes] the codes, highest bit first
    sign_mantissa [n]
    gaps [320 a block]       5 bits for each 64 bits of the stream: where its first code begins
    output_positions         uint32 [blocks + 1]: the first element of each 4096 bytes; then n
    split_positions          int64: where each tensor but the first begins

A table entry below 240 is an exponent; v >= 240 means: go on in row 256 - v with the next byte.
Exponents from 240 on (2^113 and more, infinity, NaN) cannot be stored.
"""

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.kernels import cpu_df11
from optim.runtime.kernels.cpu_df11 import BLOCK_BITS, Array
from optim.runtime.tensor_files import TensorInfo

PIECES = ("luts", "encoded_exponent", "sign_mantissa", "gaps", "output_positions")
SPLITS = "split_positions"
SUFFIXES = (*PIECES, SPLITS)
POINTER = 240  # table entries from here on name rows, so exponents cannot
BLOCK_BYTES, GAP_BYTES = BLOCK_BITS // 8, 320  # of a block: its codes, its gaps
MOST_ROWS, LONGEST = 16, 32
CHILD = 0x8000

Read = Callable[[str, int, int], Array]
"""Bytes `start`..`stop` of one of the unit's tensors."""


def codec() -> ModuleType:
    """`cpu_df11`, or `numba_df11` where there is no C compiler."""
    if cpu_df11.usable():
        return cpu_df11
    from optim.runtime.kernels import numba_df11

    return numba_df11


class Unit:
    """One unit, decoded in parts as they are asked for; every fact is checked before it is used.

    Raises OptimError (2) with the tensor's name at once for sizes that cannot be true, from
    `decode` for a stream that is not what its index says.
    """

    def __init__(self, name: str, infos: Mapping[str, TensorInfo], read: Read) -> None:
        self.name, self._read = name, read
        for piece in PIECES:
            if piece not in infos or infos[piece].dtype != torch.uint8:
                raise _damaged(name, piece, "it is missing, or not uint8")
        self.size = math.prod(infos["sign_mantissa"].shape)
        self.bytes = math.prod(infos["encoded_exponent"].shape)
        shape = infos["luts"].shape
        if len(shape) != 2 or shape[1] != 256 or not 2 <= shape[0] <= MOST_ROWS + 2:
            raise _damaged(name, "luts", f"its shape is {list(shape)}")
        self.blocks = -(-self.bytes // BLOCK_BYTES)
        if math.prod(infos["gaps"].shape) < GAP_BYTES * self.blocks:
            raise _damaged(name, "gaps", "it is too short for the stream")
        self.elements = self._elements(math.prod(infos["output_positions"].shape))
        luts = read("luts", 0, math.prod(shape)).reshape(shape)
        self.walk, self.lengths = walk_of(luts, name), luts[-1].astype(np.int64)
        self.splits = self._splits(infos.get(SPLITS))

    def _elements(self, size: int) -> Array:
        """Where each block begins; a last block in which nothing begins may be left out."""
        if size not in (4 * (self.blocks + 1), 4 * self.blocks) or not self.blocks:
            raise _damaged(self.name, "output_positions", f"{size} bytes for {self.blocks} blocks")
        found = self._read("output_positions", 0, size).view("<u4").astype(np.int64)
        steps = np.diff(found)
        if found[0] or found[-1] != self.size or (steps < 0).any() or (steps > BLOCK_BITS).any():
            raise _damaged(self.name, "output_positions", "they do not lead from 0 to the last")
        return found

    def _splits(self, info: TensorInfo | None) -> list[int]:
        """Where each tensor begins, then where the last ends."""
        if info is None or not info.nbytes:
            return [0, self.size]
        if info.dtype != torch.int64 or len(info.shape) != 1:
            raise _damaged(self.name, SPLITS, "it is not a list of int64")
        inner = self._read(SPLITS, 0, info.nbytes).view("<i8").tolist()
        found = [0, *inner, self.size]
        if any(a >= b for a, b in pairwise(found)):
            raise _damaged(self.name, SPLITS, "they do not rise")
        return found

    def bytes_of(self, piece: str, start: int, stop: int) -> Array:
        """Bytes start..stop of one of the tensors."""
        return self._read(piece, start, stop)

    def decode(self, first: int, count: int) -> Tensor:
        """`count` weights from element `first` on: bf16 `[count]`."""
        if count == 0:
            return torch.empty(0, dtype=torch.bfloat16)
        begin = int(np.searchsorted(self.elements, first, "right")) - 1
        end = int(np.searchsorted(self.elements, first + count, "left"))
        elements = self.elements[begin : end + 1]
        stop = min(self.bytes, (end + 1) * BLOCK_BYTES)
        stream = self._read("encoded_exponent", begin * BLOCK_BYTES, stop)
        rest = self._read("sign_mantissa", int(elements[0]), int(elements[-1]))
        bounds = self._bounds(begin, end)
        weights, bad = codec().decode(stream, bounds, elements - elements[0], rest, self.walk)
        if bad >= 0:
            raise _damaged(self.name, "encoded_exponent", f"block {begin + bad} does not decode")
        inside = weights[first - elements[0] :][:count]
        return torch.from_numpy(inside.view(np.int16)).view(torch.bfloat16)

    def _bounds(self, begin: int, end: int) -> tuple[Array, Array, Array]:
        """Of the blocks begin..end, from the first of them: see cpu_df11.decode."""
        until = min(end + 1, self.blocks)
        gaps = self._read("gaps", begin * GAP_BYTES, until * GAP_BYTES)[::GAP_BYTES] >> 3
        edges = np.arange(until - begin, dtype=np.int64) * BLOCK_BITS + gaps
        start, low = edges[: end - begin], edges[1:][: end - begin]
        high = low
        if low.size < start.size:  # the stream's last bits fill a byte
            last = 8 * (self.bytes - begin * BLOCK_BYTES)
            low, high = np.append(low, last - 7), np.append(high, last)
        return (
            np.ascontiguousarray(start),
            np.ascontiguousarray(low),
            np.ascontiguousarray(high),
        )


def walk_of(luts: Array, name: str) -> Array:
    """The tables uint8 `[rows + 1, 256]` as nodes uint16 `[nodes, 256]`, node 0 the root.

    An entry is `length << 8 | exponent`, or CHILD | node, or 0 where no code leads. Slots that no
    code uses may hold anything: writers leave them as they are. Raises OptimError (2) for a row
    that is not there.
    """
    rows, lengths = luts[:-1], luts[-1].astype(np.int64)
    nodes, known, made = [(0, 0)], {(0, 0): 0}, []
    for row, depth in nodes:
        entry = np.zeros(256, np.uint16)
        for value in np.unique(rows[row]).tolist():
            slots = rows[row] == value
            if value < POINTER:
                _codes(entry, slots, value, int(lengths[value]), depth)
                continue
            child = (256 - value, depth + 1)
            if child[0] >= len(rows):
                raise _damaged(name, "luts", f"row {row} leads to row {child[0]} of {len(rows)}")
            if child[0] > row and depth < 3:
                if child not in known:
                    known[child] = len(nodes)
                    nodes.append(child)
                entry[slots] = CHILD | known[child]
        made.append(entry)
    return np.stack(made)


def _codes(entry: Array, slots: Array, value: int, length: int, depth: int) -> None:
    """Enter an exponent where its whole code leads to it: 2^(bits left) slots, aligned."""
    bits = length - 8 * depth
    if 1 <= bits <= 8:
        whole = slots.reshape(-1, 1 << 8 - bits).all(1)
        entry[np.repeat(whole, 1 << 8 - bits)] = length << 8 | value


def _damaged(unit: str, piece: str, why: str) -> OptimError:
    return OptimError(f"{unit}.{piece} is damaged: {why}", "fetch or pack the model again", USAGE)
