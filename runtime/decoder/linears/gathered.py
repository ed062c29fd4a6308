"""Some rows of a W4A8 weight, some inputs of a column-wise one, as smaller weights of their own.

Integers and scales are copied as they are: the small weight gives exactly what the large one gives
for those rows, and for inputs that are zero elsewhere.
"""

import copy

import torch
from torch import Tensor

from optim.runtime.kernels.cpu import skip_int4, w4a8
from optim.runtime.kernels.huge_pages import use_huge_pages


def gather_rows(weight: w4a8.Weight, rows: Tensor) -> w4a8.Weight:
    """`weight` `[out, in]` with the outputs `rows` (int64), in that order."""
    small = copy.copy(weight)
    small.outputs = len(rows)
    small.weight = _lanes(weight.weight, rows)
    use_huge_pages(small.weight)
    small.scale = _lanes(weight.scale, rows)
    small.zero = None if weight.zero is None else _lanes(weight.zero, rows)
    small.offset = None if weight.offset is None else _lanes(weight.offset, rows)
    small.bias = None if weight.bias is None else _lanes(weight.bias, rows)
    small.layer = type(weight.layer).from_buffer_copy(weight.layer)
    small.point()
    return small


def _lanes(blocks: Tensor, rows: Tensor) -> Tensor:
    """Rows of `[blocks, n, lanes]`, where row r is lane r % lanes of block r // lanes."""
    lanes = blocks.shape[2]
    picked = blocks[rows // lanes, :, rows % lanes]
    padded = torch.nn.functional.pad(picked, (0, 0, 0, -len(rows) % lanes))
    return padded.view(-1, lanes, blocks.shape[1]).transpose(1, 2).contiguous()


def gather_columns(
    columns: skip_int4.Columns, inputs: Tensor, bias: Tensor | None
) -> skip_int4.Columns:
    """`columns` with only `inputs` (int64, ascending) and another bias.

    Groups keep the inputs that are left.
    """
    tensors = columns.tensors | {
        "weight": torch.cat([tile["weight"][inputs].flatten() for tile in columns.tiles()])
    }
    groups = torch.searchsorted(inputs, columns.groups)
    return skip_int4.Columns(columns.outputs, columns.lines, groups, tensors, bias)
