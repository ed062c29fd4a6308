"""All blocks of a decoder for one token in one C call (`decode.c`).

What the C code computes is `optim.runtime.decoder.decoder.Block` with packed linears, RMS norms
and a gated feed-forward; a test runs both over every kind of block.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from optim.runtime.cache.full import Layer
from optim.runtime.kernels.compile import NoKernel, library, team
from optim.runtime.kernels.cpu import skip_int4, w4a8
from optim.runtime.kernels.cpu import step as cpu_step

Angles = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Sizes:
    """What all blocks share. `tanh_gelu`: the activation, else silu."""

    hidden: int
    heads: int
    kv_heads: int
    dim: int
    eps: float
    scale: float
    cap: float
    residual: float
    tanh_gelu: bool


@dataclass(frozen=True, slots=True)
class Reader:
    """A packed linear without the inputs up to `threshold` in size; a `Weight` is read whole."""

    weight: w4a8.Weight | skip_int4.Columns
    threshold: float = skip_int4.NOTHING


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """One block: RMS weights fp32 (None where the family has none), packed linears."""

    before_attention: Tensor
    after_attention: Tensor | None
    before_mlp: Tensor
    after_mlp: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    qkv: Reader
    out: Reader
    up: Reader
    down: Reader
    rope: str | None
    window: int | None


NORMS = ("before_attention", "after_attention", "before_mlp", "after_mlp", "query_norm", "key_norm")
LINEARS = ("qkv", "out", "up", "down")


class _Reader(ctypes.Structure):
    """`Reader` of decode.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("whole", "columns")),
        ("threshold", ctypes.c_float),
    )


class _Block(ctypes.Structure):
    """`Block` of decode.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in NORMS),
        *((name, _Reader) for name in LINEARS),
        ("middle", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "keys", "values", "packed")),
        *((name, ctypes.c_int64) for name in ("capacity", "window")),
    )


class _Decoder(ctypes.Structure):
    """`Decoder` of decode.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("count", "hidden", "tanh_gelu")),
        *((name, ctypes.c_float) for name in ("eps", "residual")),
        ("h", ctypes.c_void_p),
        ("step", cpu_step.CStep),
        ("blocks", ctypes.c_void_p),
    )


class Blocks:
    """The blocks with their weights; call it once a token."""

    def __init__(self, weights: Sequence[BlockWeights], sizes: Sizes) -> None:
        """Raises NoKernel where the C code cannot be built."""
        self._run, self._team, self._weights = load().optim_decode, team(), weights
        self._blocks = (_Block * len(weights))(*map(_block, weights))
        self._decoder = _Decoder(
            count=len(weights),
            hidden=sizes.hidden,
            tanh_gelu=sizes.tanh_gelu,
            eps=sizes.eps,
            residual=sizes.residual,
            blocks=ctypes.addressof(self._blocks),
        )
        step = self._decoder.step
        step.batch, step.heads, step.kv_heads, step.dim = 1, sizes.heads, sizes.kv_heads, sizes.dim
        step.scale, step.cap = sizes.scale, sizes.cap
        self._address = ctypes.addressof(self._decoder)

    def __call__(
        self,
        h: Tensor,
        layers: Sequence[Layer],
        position: int,
        angles: dict[str, Angles],
    ) -> None:
        """Send `h` (fp32 contiguous `[1, 1, hidden]`, overwritten) through all blocks.

        `layers` of a cache, which `cpu_step.reads` and which have room for `position`; `angles` cos
        and signed sin `[1, 1, 1, rotary]` of every rotary kind.
        """
        step = self._decoder.step
        turns: dict[str | None, tuple[int, int | None, int | None]] = {None: (0, None, None)}
        for kind, (cos, sin) in angles.items():
            turns[kind] = cos.shape[-1], cos.data_ptr(), sin.data_ptr()
        step.position, step.half = position, cpu_step.is_half(layers[0])
        held = []
        for block, weights, layer in zip(self._blocks, self._weights, layers, strict=True):
            rotary, block.cos, block.sin = turns[weights.rope]
            step.rotary = rotary or step.rotary
            held.append(cpu_step.point(block, layer, position))
        self._decoder.h = h.data_ptr()
        if self._run(self._address, torch.get_num_threads(), self._team):
            raise MemoryError
        del held


def _block(weights: BlockWeights) -> _Block:
    def address(tensor: Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    return _Block(
        window=weights.window or 0,
        middle=weights.down.weight.inputs,
        **{name: address(getattr(weights, name)) for name in NORMS},
        **{name: _reader(getattr(weights, name)) for name in LINEARS},
    )


def _reader(reader: Reader) -> _Reader:
    whole = isinstance(reader.weight, w4a8.Weight)
    address = reader.weight.address
    return _Reader(address if whole else None, None if whole else address, reader.threshold)


@cache
def load() -> ctypes.CDLL:
    """The compiled kernel. Raises NoKernel with the reason."""
    w4a8.check()
    skip_int4.check()
    if not cpu_step.usable():
        raise NoKernel("the kernels of a decode step do not work here")
    lib = library("decode", "w4a8", "skip_int4", "step", "attention_quantized")
    lib.optim_decode.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    return lib
