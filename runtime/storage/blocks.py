"""Linears that are stored in GGUF's blocks, read as pack-quantized: the very same weights."""

import torch
from torch import Tensor

from optim.runtime.formats.bits import pack_rows
from optim.runtime.formats.blocks import Array, Blocks, open_blocks
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
    found = open_blocks(raw, kind, codes=key == "weight_packed")
    if key == "weight_packed":
        codes = torch.from_numpy(found.codes)
        if (book := kind.codebook) is not None:
            codes = (book + 128).to(torch.uint8)[codes.int()]
        bits = run_as(kind).bits
        return codes.view(torch.int32) if bits == 8 else pack_rows(codes, bits)
    grid = found.scale if key == "weight_scale" else found.offset
    assert grid is not None, key
    return grid
