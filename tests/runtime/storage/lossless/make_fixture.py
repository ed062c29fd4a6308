"""Makes data/independent.safetensors: DFloat11 by another hand, for our reader to decode.

Run once, by hand, in an environment with dahuffman 0.4.2 (the Huffman library of the published
encoder) and safetensors; none of optim is imported. Codes and stream are dahuffman's own, end of
stream included; tables, gaps and positions are made here, bit by bit, from the format's
description, and unused table slots are left as the published encoder leaves them: filled with the
value that stands before them.

    python tests/runtime/storage/lossless/make_fixture.py
"""

import random
import struct
from pathlib import Path

import numpy as np
from dahuffman import HuffmanCodec
from safetensors.numpy import save_file

SHAPES = {"a.weight": (40, 37), "b.weight": (13, 64), "c.weight": (14, 1000)}


def bf16(rng, count):
    """Normal numbers of two spreads and a few zeros and tiny ones, rounded down to bf16."""
    values = [rng.gauss(0, 0.02 if i % 5 else 0.5) for i in range(count)]
    values[::97] = [0.0] * len(values[::97])
    values[::211] = [rng.gauss(0, 1e-20) for _ in values[::211]]
    return [struct.unpack(">I", struct.pack(">f", v))[0] >> 16 for v in values]


def tables(codes):
    """Decode rows and lengths; `codes`: exponent -> text of bits."""
    heads = {c[: 8 * k] for c in codes.values() for k in range((len(c) + 7) // 8)}
    prefixes = sorted(heads, key=len)
    rows = []
    for prefix in prefixes:
        row, last = [], 0
        for slot in range(256):
            path = prefix + f"{slot:08b}"
            inner = [p for p in prefixes if p == path]
            hits = [e for e, c in codes.items() if path.startswith(c) and len(c) > len(prefix)]
            if inner:
                last = 256 - prefixes.index(inner[0])
            elif hits:
                last = hits[0]
            row.append(last)
        rows.append(row)
    rows.append([len(codes.get(e, "")) for e in range(256)])
    return np.array(rows, np.uint8)


def main():
    rng = random.Random(11)
    words = {name: bf16(rng, int(np.prod(shape))) for name, shape in SHAPES.items()}
    flat = [w for tensor in words.values() for w in tensor]
    exponents = [w >> 7 & 255 for w in flat]
    counts = {e: exponents.count(e) for e in set(exponents)}
    codec = HuffmanCodec.from_frequencies(counts)
    codes = {s: f"{v:0{n}b}" for s, (n, v) in codec.get_code_table().items() if isinstance(s, int)}
    stream = codec.encode(exponents)
    starts, at = [], 0
    for exponent in exponents:
        starts.append(at)
        at += len(codes[exponent])
    blocks = -(-len(stream) // 4096)
    gaps = []
    for window in range(blocks * 512):
        after = [s for s in (*starts, at) if s >= window * 64][:1]
        gap = after[0] - window * 64 if after else 0
        gaps.append(gap if gap < 32 else 0)
    bits = "".join(f"{gap:05b}" for gap in gaps)
    ends = [b * 32768 for b in range(blocks)]
    first = [next((i for i, s in enumerate(starts) if s >= b), len(starts)) for b in ends]
    ends = np.cumsum([len(t) for t in words.values()])
    made = {
        "unit.luts": tables(codes),
        "unit.encoded_exponent": np.frombuffer(stream, np.uint8),
        "unit.sign_mantissa": np.array([w >> 8 & 0x80 | w & 0x7F for w in flat], np.uint8),
        "unit.gaps": np.array([int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)], np.uint8),
        "unit.output_positions": np.array([*first, len(flat)], "<u4").view(np.uint8),
        "unit.split_positions": np.array(ends[:-1], np.int64),
    }
    made |= {f"original.{n}": np.array(w, np.uint16).reshape(SHAPES[n]) for n, w in words.items()}
    save_file(made, Path(__file__).parent / "data" / "independent.safetensors")


main()
