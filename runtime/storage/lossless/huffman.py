"""The code of a DFloat11 unit: Huffman over exponent counts, at most 32 bits, and its tables.

The published encoder gives an end-of-stream symbol a count of one, joins the two rarest nodes until
one is left (of equals the one with the smaller first symbol), and puts the first of a pair under
bit 0. The same here, so that the same weights make the same bytes.
"""

import heapq
from dataclasses import dataclass

import numpy as np

from optim.runtime.formats.dfloat11 import LONGEST, MOST_ROWS
from optim.runtime.kernels.door import Array

END = -1  # the end-of-stream symbol, smaller than every exponent


@dataclass(frozen=True, slots=True)
class Code:
    """`codes` uint32 `[256]` right-aligned, `lengths` uint8 `[256]`, 0 where an exponent is absent.

    `end` is the end-of-stream symbol's code as a text of bits: its head fills the last byte.
    """

    codes: Array
    lengths: Array
    end: str
    luts: Array


def code_of(counts: Array) -> Code:
    """The code for exponent counts int64 `[256]`, of which those from 240 on must be 0.

    Where a code were longer than 32 bits, or its prefixes more than the tables can hold, the rarest
    exponents are counted as equals: two of them, three, and so on.
    """
    assert counts[:240].any() and not counts[240:].any()
    present = {int(e): int(counts[e]) for e in np.flatnonzero(counts)}
    rarest = sorted(present, key=lambda e: (present[e], e))
    for equals in range(1, len(present) + 1):
        if equals > 1:
            present.update(dict.fromkeys(rarest[:equals], 1))
        words = _huffman(present)
        prefixes = _prefixes(words)
        longest = max(map(len, words.values()))
        if longest <= LONGEST and len(prefixes) <= MOST_ROWS + 1:
            break
    codes, lengths = np.zeros(256, np.uint32), np.zeros(256, np.uint8)
    end = words.pop(END)
    for exponent, word in words.items():
        codes[exponent], lengths[exponent] = int(word, 2), len(word)
    return Code(codes, lengths, end, _luts(words, prefixes, lengths))


def _huffman(counts: dict[int, int]) -> dict[int, str]:
    """Symbol -> its code as a text of bits."""
    words = dict.fromkeys([END, *counts], "")
    heap = [(1, END, [END]), *((count, symbol, [symbol]) for symbol, count in counts.items())]
    heapq.heapify(heap)
    while len(heap) > 1:
        zero, one = heapq.heappop(heap), heapq.heappop(heap)
        for bit, symbols in (("0", zero[2]), ("1", one[2])):
            for symbol in symbols:
                words[symbol] = bit + words[symbol]
        heapq.heappush(heap, (zero[0] + one[0], zero[1], zero[2] + one[2]))
    return words


def _prefixes(words: dict[int, str]) -> list[str]:
    """The whole bytes that exponents' codes begin with: a row of the tables each."""
    found = {w[:end] for s, w in words.items() if s != END for end in range(0, len(w), 8)}
    return sorted(found, key=lambda prefix: (len(prefix), prefix))


def _luts(words: dict[int, str], prefixes: list[str], lengths: Array) -> Array:
    rows = {prefix: row for row, prefix in enumerate(prefixes)}
    luts = np.zeros((len(rows) + 1, 256), np.uint8)
    for prefix, row in rows.items():
        if prefix:
            luts[rows[prefix[:-8]], int(prefix[-8:], 2)] = 256 - row
    for exponent, word in words.items():
        inside = len(word) - (len(word) - 1) % 8 - 1
        tail = word[inside:]
        first = int(tail, 2) << 8 - len(tail)
        luts[rows[word[:inside]], first : first + (1 << 8 - len(tail))] = exponent
    luts[-1] = lengths
    return luts
