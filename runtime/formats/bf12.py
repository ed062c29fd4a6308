"""bf12: bf16 without loss at a fixed 12 bits a weight, made to be computed with.

Of a bf16's two bytes the low one (an exponent bit, the mantissa) is noise and is kept as it is. The
high one (sign, 7 exponent bits) takes few values: 4 bits name one of the 16 commonest, the
*palette*; the few weights with another are *escapes*, kept in a list. Any bf16 can be held.

    low     uint8 [rows, cols]     high    uint8 [rows, width]: 64 names in 32 bytes, the first
    palette uint8 [16]                     32 in the low halves; a row's last r < 64 likewise
    at      int32 [e], rising: row * cols + column     escaped uint8 [e]: the high byte there
"""

PALETTE, GROUP = 16, 64
PIECES = ("low", "high", "palette", "at", "escaped")
SUFFIXES = tuple(f"bf12_{piece}" for piece in PIECES)
MOST_WEIGHTS = 2**31 - 1  # `at` is int32


def width(cols: int) -> int:
    """Bytes of a row's names."""
    return cols // GROUP * (GROUP // 2) + (cols % GROUP + 1) // 2
