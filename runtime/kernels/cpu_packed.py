"""Attention of one token over a packed cache on a CPU, in C (`cpu_packed.c`).

`optim.runtime.cache_packed` is the reference: `write`, then `optim.runtime.attention.attend`.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from optim.runtime.cache_packed import PackedLayer, Side, hadamard_block, packed_layers
from optim.runtime.kernels.cpu_step import set_angles
from optim.runtime.kernels.native import NoKernel, library, team, works

WIDTH = 16  # of which a head's size is a multiple


class _Side(ctypes.Structure):
    """`Side` of cpu_packed.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("bits", "capacity")),
        *((name, ctypes.c_void_p) for name in ("codes", "grid")),
    )


class _Packed(ctypes.Structure):
    """`Packed` of cpu_packed.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "dim", "block")),
        *((name, ctypes.c_int64) for name in ("rotary", "angle_stride")),
        *((name, ctypes.c_int64) for name in ("base", "position", "window")),
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("qkv", "cos", "sin", "padding", "out")),
        *((name, _Side) for name in ("old_keys", "old_values", "keys", "values")),
        ("scratch", ctypes.c_void_p),
        ("next", ctypes.c_int64),
    )


def _side(side: Side) -> _Side:
    codes, grid = side.codes, side.grid
    return _Side(side.bits, codes.shape[1], codes.data_ptr(), grid.data_ptr())


def reads(layer: PackedLayer) -> bool:
    """Whether the kernel works here, and with heads of this size."""
    return layer.rotation.shape[0] % WIDTH == 0 and usable()


def attend(
    qkv: Tensor,
    layer: PackedLayer,
    position: int,
    *,
    scale: float,
    window: int | None,
    cap: float | None,
    angles: tuple[Tensor, Tensor] | None,
    padding: Tensor | None,
) -> Tensor:
    """Turn and store the new key and value, and attend: `[B, heads * dim]`.

    `qkv` fp32 contiguous `[B, heads + 2 kv_heads, dim]`, overwritten; `position` in the cache;
    `angles` cos and signed sin `[1 or B, 1, 1, rotary]`; `padding` int64 `[B]`.
    """
    batch, all_heads, dim = qkv.shape
    kv_heads = layer.rows // batch
    heads = all_heads - 2 * kv_heads
    layer.place(position, 1)
    out = torch.empty(batch, heads * dim)
    p = _Packed(batch, heads, kv_heads, dim, hadamard_block(dim))
    p.base, p.position, p.window = layer.base, position, window or 0
    p.scale, p.cap = scale, cap or 0.0
    set_angles(p, angles)
    p.qkv, p.out = qkv.data_ptr(), out.data_ptr()
    p.padding = None if padding is None else padding.data_ptr()
    p.old_keys, p.old_values = _side(layer.old_keys), _side(layer.old_values)
    p.keys, p.values = _side(layer.keys), _side(layer.values)
    if load().optim_attend_packed(ctypes.addressof(p), torch.get_num_threads(), team()):
        raise MemoryError
    return out


@cache
def load() -> ctypes.CDLL:
    """The compiled kernel. Raises NoKernel with the reason."""
    lib = library("cpu_packed")
    lib.optim_attend_packed.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    return lib


def usable() -> bool:
    """Whether the kernel can be built here and agrees with torch."""
    return works(check)


def check() -> str:
    """Compares a call with torch on odd shapes. Raises NoKernel."""
    generator = torch.Generator().manual_seed(0)
    for bits in (8, 4):
        (layer,) = packed_layers(1, 1, 2, 48, torch.device("cpu"), bits)
        assert isinstance(layer, PackedLayer)
        layer.grow(320)
        past = torch.randn(2, 1, 300, 2, 48, generator=generator)
        for start in (0, 200):
            layer.write(past[0, :, start : start + 200], past[1, :, start : start + 200], start)
        qkv = torch.randn(1, 10, 48, generator=generator)
        q = qkv[0, :6].reshape(2, 3, 48).clone()
        got = attend(qkv, layer, 300, scale=0.3, window=None, cap=None, angles=None, padding=None)
        chances = torch.softmax(layer.scores(q, 0, 301, 0.3), -1)
        wanted = layer.mix(chances, 0, 301).view(1, -1)
        if not (got - wanted).abs().max() < 1e-4 * wanted.abs().max():
            raise NoKernel("it does not agree with torch")
    return "attention over 8 and 4 bits"
