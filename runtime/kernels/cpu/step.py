"""The small work of a decode step on a CPU in C (`step.c`): norm, gate, attention of one token.

The references are `optim.runtime.decoder.layers.rms_norm` and
`optim.runtime.cache.attention.attend`.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from optim.runtime.cache.full import Layer, LayerCache
from optim.runtime.cache.quantized import PackedLayer, packed_layers
from optim.runtime.kernels.compile import NoKernel, library, team, works
from optim.runtime.kernels.cpu.attention_quantized import WIDTH, CPacked, CSide
from optim.runtime.kernels.door import Struct, WrongTensor, address

CPU = torch.device("cpu")
LANES = 8  # of which a head's size is a multiple


class CStep(Struct):
    """`Step` of optim.h."""

    NAME = "Step"

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "dim", "rotary")),
        *((name, ctypes.c_int64) for name in ("capacity", "position", "window", "angle_stride")),
        ("half", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("qkv", "cos", "sin", "keys", "values")),
        *((name, ctypes.c_void_p) for name in ("packed", "padding", "out", "scratch")),
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
        heads, dim = step.heads, step.dim
        out = torch.empty(batch, heads * dim)
        step.batch, step.position = batch, position
        point(step, layer, position, batch * step.kv_heads, dim)
        step.rotary = turns(step, angles, batch, dim)
        step.angle_stride = 0 if angles is None or angles[0].shape[0] == 1 else step.rotary
        count = batch * (heads + 2 * step.kv_heads) * dim
        step.qkv = address(qkv, torch.float32, count)
        step.out = address(out, torch.float32, batch * heads * dim)
        step.point("padding", padding, torch.int64, batch)
        if self._run(self._address, torch.get_num_threads(), self._team):
            raise MemoryError
        return out


def turns(target: Struct, angles: tuple[Tensor, Tensor] | None, batch: int, dim: int) -> int:
    """Show C the angles, cos and signed sin `[1 or batch, .., rotary]`; how many channels turn."""
    if angles is None:
        return 0
    rotary = angles[0].shape[-1]
    rows = angles[0].numel() // rotary
    if rotary % 2 or rotary > dim or rows not in (1, batch):
        raise WrongTensor(f"angles {list(angles[0].shape)} for {batch} heads of {dim}")
    for name, values in zip(("cos", "sin"), angles, strict=True):
        target.point(name, values, torch.float32, rows * rotary)
    return rotary


def reads(layer: Layer) -> bool:
    """Whether the kernel reads this kind of cache."""
    if isinstance(layer, PackedLayer):
        return layer.rotation.shape[0] % WIDTH == 0
    return isinstance(layer, LayerCache) and not layer.transposed and layer.keys.dim() == 3


def is_half(layer: Layer) -> bool:
    """Whether keys and values are fp16."""
    return isinstance(layer, LayerCache) and layer.keys.dtype == torch.float16


def point(target: Struct, layer: Layer, position: int, rows: int, dim: int, count: int = 1) -> None:
    """Show C where `layer` lies: `rows` vectors of `dim` a position, with room for `count` more
    from `position` on."""
    if isinstance(layer, PackedLayer):
        layer.place(position, 1)
        sides: CPacked = target.__dict__.setdefault("sides", CPacked())
        sides.follow(layer, position + count - 1, rows, dim)
        target.packed = ctypes.addressof(sides)
        return
    assert isinstance(layer, LayerCache)
    target.packed = None
    point_dense(target, layer, position, rows, dim, count)


def point_dense(
    target: Struct, layer: LayerCache, position: int, rows: int, dim: int, count: int
) -> None:
    """`point` for a cache of values as they are."""
    capacity, dtype = layer.values.shape[1], torch.float16 if is_half(layer) else torch.float32
    if position + count > capacity:
        raise WrongTensor(f"a cache of {capacity} positions has no room for {position} + {count}")
    target.capacity, target.half = capacity, dtype == torch.float16
    target.point("keys", layer.keys, dtype, rows * capacity * dim)
    target.point("values", layer.values, dtype, rows * capacity * dim)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight; fp32 contiguous `x` `[..., n]`, `weight` `[n]`."""
    y = torch.empty_like(x)
    n = weight.shape[0]
    count = x.numel() // n * n
    places = address(x, torch.float32, count), address(weight, torch.float32, n)
    load().optim_rms_norm(*places, address(y, torch.float32, count), x.numel() // n, n, eps)
    return y


def swiglu(h: Tensor) -> Tensor:
    """silu(gate) * up of fp32 contiguous `h` `[..., 2n]`, gate first: `[..., n]`."""
    n = h.shape[-1] // 2
    y = torch.empty(*h.shape[:-1], n)
    rows = y.numel() // n
    given, made = address(h, torch.float32, rows * 2 * n), address(y, torch.float32, rows * n)
    load().optim_swiglu(given, made, rows, n)
    return y


@cache
def load() -> ctypes.CDLL:
    """The compiled kernel. Raises NoKernel with the reason."""
    lib = library("step", "attention_quantized", structs=(CStep, CPacked, CSide))
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
