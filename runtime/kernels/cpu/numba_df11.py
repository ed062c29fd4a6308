"""What `cpu_df11` does, in numba: for machines without a C compiler. One symbol a lookup."""

import numba
import numpy as np

from optim.runtime.kernels.cpu.df11 import Stream
from optim.runtime.kernels.door import Array

CHILD = 0x8000


def count(weights: Array, exponents: Array, rest: Array) -> None:
    """Add to int64 `[256]` each how often every exponent and every rest comes."""
    _count(weights, exponents, rest)


def encode(weights: Array, stream: Stream) -> tuple[Array, Array]:
    """Append `weights`: (finished bytes of the stream, sign and mantissa), both uint8."""
    state = np.array(
        [getattr(stream.state, key) for key in ("word", "bits", "window", "element")], np.uint64
    )
    words = np.empty(weights.size // 2 + 2, np.uint64)
    rest = np.empty(weights.size, np.uint8)
    written = _encode(
        weights, stream.codes, stream.lengths, state, words, rest, stream.gaps, stream.positions
    )
    stream.state.word, stream.state.bits, stream.state.window, stream.state.element = map(
        int, state
    )
    return words[:written].byteswap().view(np.uint8), rest


def decode(
    stream: Array, bounds: tuple[Array, Array, Array], elements: Array, rest: Array, walk: Array
) -> tuple[Array, int]:
    """The weights uint16 of some blocks, and the first block that does not hold, or -1."""
    out = np.empty(rest.size, np.uint16)
    bad = _decode(stream, stream.size, *bounds, elements, rest, out, walk)
    return out, int(bad)


@numba.njit(cache=True)
def _count(weights: Array, exponents: Array, rest: Array) -> None:
    for w in weights:
        exponents[w >> 7 & 0xFF] += 1
        rest[(w >> 8 & 0x80) | (w & 0x7F)] += 1


@numba.njit(cache=True)
def _encode(
    weights: Array,
    codes: Array,
    lengths: Array,
    state: Array,
    words: Array,
    rest: Array,
    gaps: Array,
    positions: Array,
) -> int:
    word, bits, window = state[0], np.int64(state[1]), np.int64(state[2])
    first, element = window, np.int64(state[3])
    for i in range(weights.size):
        w = weights[i]
        rest[i] = (w >> 8 & 0x80) | (w & 0x7F)
        value, length = np.uint64(codes[w >> 7 & 0xFF]), np.int64(lengths[w >> 7 & 0xFF])
        over = bits + length - 64
        if over < 0:
            word = word << np.uint64(length) | value
            bits += length
            continue
        words[window - first] = word << np.uint64(length - over) | value >> np.uint64(over)
        window += 1
        word = value & ((np.uint64(1) << np.uint64(over)) - np.uint64(1))
        bits = over
        gaps[window] = over
        if window % 512 == 0:
            positions[window // 512] = element + i + 1
    state[0], state[1], state[2], state[3] = word, bits, window, element + weights.size
    return int(window - first)


@numba.njit(cache=True)
def _decode(
    stream: Array,
    size: int,
    start: Array,
    low: Array,
    high: Array,
    elements: Array,
    rest: Array,
    out: Array,
    walk: Array,
) -> int:
    for block in range(start.size):
        at = start[block]
        for i in range(elements[block], elements[block + 1]):
            entry, place = np.uint32(CHILD), at
            while entry & CHILD:
                if place - at > 24 or at >= size * 8:
                    return block
                byte = place >> 3
                first = np.uint32(stream[byte]) if byte < size else np.uint32(0)
                second = np.uint32(stream[byte + 1]) if byte + 1 < size else np.uint32(0)
                pair = first << 8 | second
                index = pair >> np.uint32(8 - (place & 7)) & np.uint32(0xFF)
                entry = np.uint32(walk[entry & ~np.uint32(CHILD), index])
                place += 8
            if entry == 0:
                return block
            at += np.int64(entry >> 8)
            out[i] = (rest[i] & 0x80) << 8 | (entry & 0xFF) << 7 | (rest[i] & 0x7F)
        if at < low[block] or at > high[block]:
            return block
    return -1
