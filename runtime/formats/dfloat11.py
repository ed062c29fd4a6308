"""DFloat11 (arXiv 2504.11651; the format of LeanModels' package 0.5.0): bf16 without loss.

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

PIECES = ("luts", "encoded_exponent", "sign_mantissa", "gaps", "output_positions")
SPLITS = "split_positions"
SUFFIXES = (*PIECES, SPLITS)
POINTER = 240  # table entries from here on name rows, so exponents cannot
BLOCK_BITS, BLOCK_BYTES, GAP_BYTES = 32768, 4096, 320  # of a block: its codes, its gaps
MOST_ROWS, LONGEST = 16, 32
CHILD = 0x8000
