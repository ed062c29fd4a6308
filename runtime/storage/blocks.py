"""Linears that are stored in GGUF's blocks, read as pack-quantized: the very same weights."""

import torch
from torch import Tensor

from optim.runtime.formats.bits import pack_rows
from optim.runtime.formats.blocks import Array, Blocks, nibble_words, open_blocks
from optim.runtime.formats.schemes import Scheme


def run_as(kind: Blocks) -> Scheme:
    """The scheme under which the runtime has a type's weights; those of a codebook in 8 bits."""
    bits = kind.bits if kind.codebook is None else 8
    return Scheme(bits, kind.group, symmetric=not kind.offset, offset=kind.offset)


def scale_type(kind: Blocks) -> torch.dtype:
    """Of a type's scales and offsets: those of a K type are products that fp16 cannot hold."""
    return torch.float32 if kind.nested else torch.float16


def part_of(raw: Array, kind: Blocks, key: str) -> Tensor:
    """`weight_packed`, `weight_scale` or `weight_offset` of blocks `[out, bytes of a row]`."""
    if key == "weight_packed":
        return _packed(raw, kind)
    found = open_blocks(raw, kind, codes=False)
    grid = found.scale if key == "weight_scale" else found.offset
    assert grid is not None, key
    return grid


def _packed(raw: Array, kind: Blocks) -> Tensor:
    book, bits = kind.codebook, run_as(kind).bits
    if book is None and (whole := nibble_words(raw, kind)) is not None:
        return whole
    codes = torch.from_numpy(open_blocks(raw, kind).codes)
    if book is not None:
        codes = (book + 128).to(torch.uint8)[codes.int()]
    return codes.view(torch.int32) if bits == 8 else pack_rows(codes, bits)
