"""The small work of a decode step on a CPU in C (`step.c`): norm, gate, attention of one token.

The references are `optim.runtime.decoder.layers.rms_norm` and
`optim.runtime.cache.attention.attend`.
"""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from optim.runtime.cache.full import Layer, LayerCache
from optim.runtime.cache.quantized import PackedLayer, packed_layers
from optim.runtime.kernels.compile import NoKernel, library, team, works
from optim.runtime.kernels.cpu.attention_quantized import WIDTH, Packed, packed

CPU = torch.device("cpu")
LANES = 8  # of which a head's size is a multiple


class CStep(ctypes.Structure):
    """`Step` of step.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "dim", "rotary")),
        *((name, ctypes.c_int64) for name in ("capacity", "position", "window", "angle_stride")),
        ("half", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("qkv", "cos", "sin", "keys", "values")),
        *((name, ctypes.c_void_p) for name in ("packed", "padding", "out", "scratch")),
        ("next", ctypes.c_int64),
    )


class Attend:
    """Attention of one new token with fixed shapes; call it once a step and layer."""

    def __init__(
        self, heads: int, kv_heads: int, dim: int, scale: float, window: int | None, cap: float
    ) -> None:
        self._run, self._team = load().optim_attend, team()
        self._step = CStep(heads=heads, kv_heads=kv_heads, dim=dim, scale=scale, cap=cap)
        self._step.window = window or 0
        self._address = ctypes.addressof(self._step)

    def __call__(
        self,
        qkv: Tensor,
        layer: Layer,
        position: int,
        angles: tuple[Tensor, Tensor] | None,
        padding: Tensor | None,
    ) -> Tensor:
        """Turn and store the new key and value, and attend: `[B, heads * dim]`.

        `qkv` fp32 contiguous `[B, heads + 2 kv_heads, dim]`, overwritten; `layer` one that `reads`
        knows, with room for `position`; `angles` cos and signed sin `[1 or B, 1, 1, rotary]`;
        `padding` int64 `[B]`.
        """
        step, batch = self._step, qkv.shape[0]
        out = torch.empty(batch, step.heads * step.dim)
        step.batch, step.position = batch, position
        step.half = is_half(layer)
        held = point(step, layer, position)
        self._turn(angles)
        step.qkv, step.out = qkv.data_ptr(), out.data_ptr()
        step.padding = None if padding is None else padding.data_ptr()
        if self._run(self._address, torch.get_num_threads(), self._team):
            raise MemoryError
        del held
        return out

    def _turn(self, angles: tuple[Tensor, Tensor] | None) -> None:
        step = self._step
        step.rotary = 0
        if angles is not None:
            cos, sin = angles
            step.rotary, step.cos, step.sin = cos.shape[-1], cos.data_ptr(), sin.data_ptr()
            step.angle_stride = 0 if cos.shape[0] == 1 else cos.shape[-1]


def reads(layer: Layer) -> bool:
    """Whether the kernel reads this kind of cache."""
    if isinstance(layer, PackedLayer):
        return layer.rotation.shape[0] % WIDTH == 0
    return isinstance(layer, LayerCache) and not layer.transposed and layer.keys.dim() == 3


def is_half(layer: Layer) -> bool:
    """Whether keys and values are fp16."""
    return isinstance(layer, LayerCache) and layer.keys.dtype == torch.float16


def point(target: Any, layer: Layer, position: int) -> Packed | None:
    """Show a C structure where `layer` lies. What is returned must live as long as that is used."""
    if isinstance(layer, PackedLayer):
        layer.place(position, 1)
        sides = packed(layer)
        target.packed = ctypes.addressof(sides)
        return sides
    assert isinstance(layer, LayerCache)
    target.packed, target.capacity = None, layer.values.shape[1]
    target.keys, target.values = layer.keys.data_ptr(), layer.values.data_ptr()
    return None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight; fp32 contiguous `x` `[..., n]`, `weight` `[n]`."""
    y = torch.empty_like(x)
    n = weight.shape[0]
    pointers = x.data_ptr(), weight.data_ptr(), y.data_ptr()
    load().optim_rms_norm(*pointers, x.numel() // n, n, eps)
    return y


def swiglu(h: Tensor) -> Tensor:
    """silu(gate) * up of fp32 contiguous `h` `[..., 2n]`, gate first: `[..., n]`."""
    n = h.shape[-1] // 2
    y = torch.empty(*h.shape[:-1], n)
    load().optim_swiglu(h.data_ptr(), y.data_ptr(), y.numel() // n, n)
    return y


@cache
def load() -> ctypes.CDLL:
    """The compiled kernel. Raises NoKernel with the reason."""
    lib = library("step", "attention_quantized")
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    lib.optim_attend.argtypes = [pointer, ctypes.c_int, pointer]
    lib.optim_rms_norm.argtypes = [*[pointer] * 3, integer, integer, ctypes.c_float]
    lib.optim_rms_norm.restype = None
    lib.optim_swiglu.argtypes = [pointer, pointer, integer, integer]
    lib.optim_swiglu.restype = None
    return lib


def reads_half() -> bool:
    """Whether keys and values may be fp16 here."""
    return bool(load().optim_reads_half())


def usable() -> bool:
    """Whether the kernel can be built here and agrees with torch."""
    return works(check)


def check() -> str:
    """Compares the calls with torch on odd shapes. Raises NoKernel."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 71, generator=generator), torch.rand(71, generator=generator)
    wanted = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    error = (rms_norm(x, weight, 1e-5) - wanted).abs().max() / wanted.abs().max()
    plain = LayerCache(False, *torch.randn(2, 2, 160, 48, generator=generator))
    layers = [plain, *(packed_layers(1, 1, 2, 48, CPU, bits)[0] for bits in (8, 4))]
    for layer in layers:
        layer.grow(160)
        past = torch.randn(2, 1, 150, 2, 48, generator=generator)
        for start in (0, 140):
            layer.write(past[0, :, start : start + 140], past[1, :, start : start + 140], start)
        qkv = torch.randn(1, 10, 48, generator=generator)
        q = qkv[0, :6].reshape(2, 3, 48).clone()
        got = Attend(6, 2, 48, 0.3, None, 0.0)(qkv, layer, 150, None, None)
        seen = layer.mix(torch.softmax(layer.scores(q, 0, 151, 0.3), -1), 0, 151).view(1, -1)
        error = torch.maximum(error, (got - seen).abs().max() / seen.abs().max())
    if not float(error) < 1e-4:
        raise NoKernel("it does not agree with torch")
    return "norm, gate, rope, attention over 16, 8 and 4 bits"
