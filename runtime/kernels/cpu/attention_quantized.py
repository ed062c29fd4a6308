"""How C reads a packed cache (`attention_quantized.c`): where its sides lie.

`optim.runtime.cache.quantized` is the reference; step.py runs it and compares.
"""

import ctypes

from optim.runtime.cache.quantized import PackedLayer, Side

WIDTH = 16  # of which a head's size is a multiple


class _Side(ctypes.Structure):
    """`Side` of optim.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("bits", "capacity")),
        *((name, ctypes.c_void_p) for name in ("codes", "grid")),
    )


class Packed(ctypes.Structure):
    """`Packed` of optim.h."""

    _fields_ = (
        ("base", ctypes.c_int64),
        *((name, _Side) for name in ("old_keys", "old_values", "keys", "values")),
    )


def packed(layer: PackedLayer) -> Packed:
    """The sides of `layer` as they lie now."""
    old = _side(layer.old_keys), _side(layer.old_values)
    return Packed(layer.base, *old, _side(layer.keys), _side(layer.values))


def _side(side: Side) -> _Side:
    codes, grid = side.codes, side.grid
    return _Side(side.bits, codes.shape[1], codes.data_ptr(), grid.data_ptr())
