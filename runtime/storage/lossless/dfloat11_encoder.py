"""Write DFloat11 units (formats/dfloat11.py); the weights pass through in pieces.

A unit is gone through twice: once to count exponents, which gives the code and so every size, and
once to encode. What is in memory is a piece, the gaps and the positions.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from optim.runtime.formats.dfloat11 import (
    BLOCK_BYTES,
    GAP_BYTES,
    PIECES,
    POINTER,
    SPLITS,
    SUFFIXES,
)
from optim.runtime.kernels.bf12 import words
from optim.runtime.kernels.cpu.df11 import Stream
from optim.runtime.kernels.df11 import codec
from optim.runtime.kernels.door import Array
from optim.runtime.storage.lossless.huffman import Code, code_of

VERSION = "0.5.0"  # of the published format
MOST_WEIGHTS = 2**31 - 1  # of a unit: the published decoder counts in int32
GAPS_AT_ONCE = 1 << 14  # groups of eight: widened they stay in the cache
JOINS = tuple(
    (np.uint64(bits), np.uint64(odd))
    for bits, odd in ((3, 0x00FF00FF00FF00FF), (6, 0x0000FFFF0000FFFF), (12, 0x00000000FFFFFFFF))
)  # how far the even of two neighbours move to meet the odd ones


class Counts:
    """How often each exponent, and each sign and mantissa, comes: int64 `[256]` each."""

    def __init__(self) -> None:
        self.exponents, self.rest = np.zeros(256, np.int64), np.zeros(256, np.int64)

    def add(self, weights: Tensor) -> None:
        """Count a bf16 tensor."""
        codec().count(words(weights).reshape(-1), self.exponents, self.rest)

    @property
    def size(self) -> int:
        return int(self.exponents.sum())

    @property
    def unfit(self) -> str:
        """Why DFloat11 cannot hold every one of them; empty if it can."""
        large = self.exponents[POINTER:].any()
        return "DFloat11 cannot hold 2^113 and more, Inf or NaN" if large else ""

    def limit(self) -> float:
        """Bits a weight that no code of single weights goes below: H(exponent) + H(rest)."""
        return _entropy(self.exponents) + _entropy(self.rest)


class Encoder:
    """One unit: `push` its weights in order, then `finish`. `sizes` are known from the start."""

    def __init__(self, counts: Array, splits: Sequence[int]) -> None:
        """`counts` of the unit's exponents; `splits` where each tensor but the first begins."""
        self.code: Code = code_of(counts)
        self.stream_bits = int((counts * self.code.lengths).sum())
        self.size, self.splits = int(counts.sum()), np.array(splits, np.int64)
        self.bytes = -(-self.stream_bits // 8)
        self.blocks = -(-self.bytes // BLOCK_BYTES)
        gaps = np.zeros(self.blocks * BLOCK_BYTES // 8 + 1, np.uint8)
        positions = np.zeros(self.blocks + 2, np.uint32)
        self._stream = Stream(self.code.codes, self.code.lengths, gaps, positions)

    def sizes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of the unit's tensors."""
        lengths = {
            "luts": self.code.luts.shape,
            "encoded_exponent": (self.bytes,),
            "sign_mantissa": (self.size,),
            "gaps": (GAP_BYTES * self.blocks,),
            "output_positions": (4 * (self.blocks + 1),),
        }
        made = {piece: (torch.uint8, tuple(lengths[piece])) for piece in PIECES}
        return made | {SPLITS: (torch.int64, self.splits.shape)}

    def bits(self, tally: Counts) -> float:
        """Bits a weight of one of the unit's tensors.

        A tensor bears the index and the tables by its share of the stream.
        """
        total = 8 * sum(math.prod(shape) * t.itemsize for t, shape in self.sizes().values())
        counts = tally.exponents
        coded = int((counts * self.code.lengths).sum()) / self.stream_bits
        return 8 + coded * (total - 8 * self.size) / int(counts.sum())

    def push(self, weights: Tensor) -> dict[str, Array]:
        """Encode the next weights: what to append to `encoded_exponent` and `sign_mantissa`."""
        stream, rest = codec().encode(words(weights).reshape(-1), self._stream)
        return {"encoded_exponent": stream, "sign_mantissa": rest}

    def finish(self) -> dict[str, Array]:
        """The stream's last bytes and the other tensors."""
        state, stream = self._stream.state, self._stream
        assert state.element == self.size
        text = f"{state.word:0{state.bits}b}" if state.bits else ""
        text += self.code.end[: -len(text) % 8]
        text += "0" * (-len(text) % 8)  # only an end code of less than 8 bits leaves any
        tail = bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))
        positions = stream.positions[: self.blocks + 1]
        positions[-1] = self.size
        return {
            "luts": self.code.luts,
            "encoded_exponent": np.frombuffer(tail, np.uint8),
            "gaps": _five_bits(stream.gaps[:-1]),
            "output_positions": positions.astype("<u4").view(np.uint8),
            SPLITS: self.splits.astype("<i8"),
        }


def encode(tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """Some bf16 tensors as one unit in memory: SUFFIXES -> tensor. None may be Counts.unfit."""
    tensors = list(tensors)
    counts = Counts()
    for tensor in tensors:
        counts.add(tensor)
    ends = np.cumsum([tensor.numel() for tensor in tensors])
    encoder = Encoder(counts.exponents, ends[:-1].tolist())
    parts: dict[str, list[Array]] = {suffix: [] for suffix in SUFFIXES}
    for made in (*map(encoder.push, tensors), encoder.finish()):
        for suffix, array in made.items():
            parts[suffix].append(array)
    return {suffix: torch.from_numpy(np.concatenate(arrays)) for suffix, arrays in parts.items()}


def _five_bits(gaps: Array) -> Array:
    """uint8 `[n]` below 32, n a multiple of 8 -> 5 bits each, highest first: uint8 `[5 n / 8]`.

    Eight at a time in a word: bytes to pairs of 10 bits, those to 20, those to 40.
    """
    packed = np.empty((gaps.size // 8, 5), np.uint8)
    for start in range(0, len(packed), GAPS_AT_ONCE):
        some = gaps[8 * start : 8 * (start + GAPS_AT_ONCE)].view(">u8").astype(np.uint64)
        for bits, odd in JOINS:
            some = (some & ~odd) >> bits | some & odd
        packed[start : start + len(some)] = some.astype(">u8").view(np.uint8).reshape(-1, 8)[:, 3:]
    return packed.reshape(-1)


def _entropy(counts: Array) -> float:
    """Bits of a symbol that comes as often as `counts` say."""
    total = counts.sum()
    if not total:
        return 0.0
    p = counts[counts > 0] / total
    return float(-(p * np.log2(p)).sum())
