"""How C reads a packed cache (`attention_quantized.c`): where its sides lie.

`optim.runtime.cache.quantized` is the reference; step.py runs it and compares.
"""

import ctypes

import torch

from optim.runtime.cache.quantized import PackedLayer, Side
from optim.runtime.kernels.door import Struct, WrongTensor

WIDTH = 16  # of which a head's size is a multiple
SIDES = ("old_keys", "old_values", "keys", "values")


class CSide(Struct):
    """`Side` of optim.h."""

    NAME = "Side"

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("bits", "capacity")),
        *((name, ctypes.c_void_p) for name in ("codes", "grid")),
    )


class CPacked(Struct):
    """`Packed` of optim.h: where the sides of a layer lie, as `follow` saw them last."""

    NAME = "Packed"
    _fields_ = (
        ("base", ctypes.c_int64),
        *((name, CSide) for name in SIDES),
    )

    def __init__(self) -> None:
        super().__init__()
        self._sides: list[tuple[str, CSide]] = [(name, getattr(self, name)) for name in SIDES]

    def follow(self, layer: PackedLayer, position: int, rows: int, dim: int) -> None:
        """`layer`, of `rows` vectors of `dim` a position, which has room for `position`."""
        if not layer.base <= position < layer.base + layer.keys.codes.shape[1]:
            raise WrongTensor(f"a cache from {layer.base} on has no room for {position}")
        self.base = layer.base
        for name, seen in self._sides:
            side: Side = getattr(layer, name)
            capacity = side.codes.shape[1]
            if name.startswith("old") and capacity < layer.base:
                raise WrongTensor(f"{layer.base} old positions in a cache of {capacity}")
            seen.bits, seen.capacity = side.bits, capacity
            seen.point("codes", side.codes, torch.uint8, rows * capacity * dim * side.bits // 8)
            seen.point("grid", side.grid, torch.bfloat16, rows * capacity * 2)
