"""All blocks of a decoder for a few tokens of some texts in one C call (`decode.c`).

What the C code computes is `optim.runtime.decoder.decoder.Block` with linears that are packed, or
of bf16 weights, RMS norms and a gated feed-forward; a test runs both over every kind of block.
"""

import ctypes
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cache
from operator import is_

import torch
from torch import Tensor

from optim.runtime.cache.full import Layer, LayerCache, LayeredCache
from optim.runtime.kernels.compile import NoKernel, library, team
from optim.runtime.kernels.cpu import attention_prompt, dense, skip_int4, w4a8
from optim.runtime.kernels.cpu import step as cpu_step
from optim.runtime.kernels.cpu.attention_quantized import CPacked, CSide
from optim.runtime.kernels.cpu.bf12 import CPlanes
from optim.runtime.kernels.door import Struct, WrongTensor, address

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
    """A linear without the inputs up to `threshold` in size, which only `Columns` do not read."""

    weight: w4a8.Weight | skip_int4.Columns | dense.Dense
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


SOURCES = (
    *("decode", "w4a8", "skip_int4", "bf16", "bf12", "shortlist"),
    *("step", "attention_quantized", "attention_prompt"),
)
"""The files of one library: each takes a compiler a while, and most of these call one another."""
NORMS = ("before_attention", "after_attention", "before_mlp", "after_mlp", "query_norm", "key_norm")
HEAD_NORMS = ("query_norm", "key_norm")
LINEARS = ("qkv", "out", "up", "down")


class CReader(Struct):
    """`Reader` of decode.c."""

    NAME = "Reader"

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("whole", "columns", "dense")),
        ("threshold", ctypes.c_float),
    )


class CAngles(Struct):
    """`Angles` of decode.c."""

    NAME = "Angles"

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("cos", "sin")),
        ("rotary", ctypes.c_int64),
    )


class CBlock(Struct):
    """`Block` of decode.c."""

    NAME = "Block"

    _fields_ = (
        *((name, ctypes.c_void_p) for name in NORMS),
        *((name, CReader) for name in LINEARS),
        ("middle", ctypes.c_int64),
        ("angles", ctypes.c_void_p),
        ("window", ctypes.c_int64),
    )


class CPlace(Struct):
    """`Place` of decode.c."""

    NAME = "Place"

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values", "packed")),
        *((name, ctypes.c_int64) for name in ("capacity", "half")),
    )


class CText(Struct):
    """`Text` of decode.c."""

    NAME = "Text"

    _fields_ = (
        ("places", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("first", "tokens", "position")),
        ("scores", ctypes.c_void_p),
    )


class CDecoder(Struct):
    """`Decoder` of decode.c."""

    NAME = "Decoder"

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("count", "hidden", "tokens", "texts")),
        *((name, ctypes.c_int64) for name in ("tanh_gelu", "prompt")),
        *((name, ctypes.c_float) for name in ("eps", "residual")),
        ("h", ctypes.c_void_p),
        ("step", cpu_step.CStep),
        *((name, ctypes.c_void_p) for name in ("blocks", "text")),
    )


class Places:
    """Where C finds the layers of one text's cache."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._array = (CPlace * len(layers))()
        self._places = list(self._array)  # what `point` keeps is kept by these
        self._layers = layers
        self._plain = [layer for layer in layers if isinstance(layer, LayerCache)]
        self._shown: list[Tensor] = []
        self.address = ctypes.addressof(self._array)

    def follow(self, position: int, count: int, rows: int, dim: int) -> None:
        """Look where the layers, with room for `count` positions from `position` on, lie now."""
        if self._lie_as_shown(position + count):
            return
        for place, layer in zip(self._places, self._layers, strict=True):
            cpu_step.point(place, layer, position, rows, dim, count)
        if len(self._plain) == len(self._layers):
            self._shown, self._room = self._tensors(), min(p.capacity for p in self._places)

    def _lie_as_shown(self, end: int) -> bool:
        """Whether nothing has moved, as in nearly every step; packed layers always may."""
        fits = bool(self._shown) and end <= self._room
        return fits and all(map(is_, self._tensors(), self._shown))

    def _tensors(self) -> list[Tensor]:
        return [tensor for layer in self._plain for tensor in (layer.keys, layer.values)]


@dataclass(frozen=True, slots=True)
class Part:
    """The part of one text: `count` tokens from `position` on, in layers that `reads` knows."""

    cache: LayeredCache
    position: int
    count: int


class Blocks:
    """The blocks with their weights; call it once a step."""

    def __init__(self, weights: Sequence[BlockWeights], sizes: Sizes) -> None:
        """Raises NoKernel where the C code cannot be built."""
        self._run, self._team, self._weights = load().optim_decode, team(), weights
        self._array = (CBlock * len(weights))()
        self._blocks = list(self._array)  # what `point` keeps is kept by these
        self._sizes = sizes
        self._angles = {of.rope: CAngles() for of in weights if of.rope is not None}
        self._whole = all(
            isinstance(reader.weight, w4a8.Weight) and reader.threshold == skip_int4.NOTHING
            for block in weights
            for reader in (block.qkv, block.out, block.up, block.down)
        )
        for block, of in zip(self._blocks, weights, strict=True):
            _fill(block, of, sizes)
            if of.rope is not None:
                block.angles = ctypes.addressof(self._angles[of.rope])
        self._decoder = CDecoder(
            hidden=sizes.hidden,
            tanh_gelu=sizes.tanh_gelu,
            eps=sizes.eps,
            residual=sizes.residual,
        )
        step = self._decoder.step
        step.batch, step.heads, step.kv_heads, step.dim = 1, sizes.heads, sizes.kv_heads, sizes.dim
        step.scale, step.cap = sizes.scale, sizes.cap
        self._address = ctypes.addressof(self._decoder)

    def __call__(self, h: Tensor, parts: Sequence[Part], angles: dict[str, Angles]) -> None:
        """Send `h` (fp32 contiguous, `hidden` a token, overwritten) through all blocks.

        Each text gets what it would get alone, a token at a time. `angles` cos and signed sin, in
        order of the tokens, `rotary` each, of every rotary kind.
        """
        self._show(h, parts, angles)
        self._decoder.count, self._decoder.prompt = len(self._blocks), False
        self._decoder.blocks = ctypes.addressof(self._array)
        self._call()

    def read(self, h: Tensor, part: Part, angles: dict[str, Angles]) -> Generator[None, None, None]:
        """The same with many tokens of one text, over weights and layers that `reads` knows.

        A block a call, and a pause after each, in which other texts may go on.
        """
        shown = None
        for i in range(len(self._blocks)):
            if shown is None or self._texts is not shown:  # others went on in the pause
                self._show(h, [part], angles)
                shown = self._texts
            text, places = self._texts[0], part.cache.places
            assert isinstance(places, Places)
            self._decoder.count, self._decoder.prompt = 1, True
            self._decoder.blocks = ctypes.addressof(self._array) + i * ctypes.sizeof(CBlock)
            text.places = places.address + i * ctypes.sizeof(CPlace)
            self._call()
            yield

    def reads(self, layers: Sequence[Layer]) -> bool:
        """Whether `read` knows these layers, and the blocks' linears."""
        return self._whole and all(map(attention_prompt.reads, layers))

    def _show(self, h: Tensor, parts: Sequence[Part], angles: dict[str, Angles]) -> None:
        """Let C see the tokens, and where their texts are."""
        sizes, tokens = self._sizes, sum(part.count for part in parts)
        for kind, shown in self._angles.items():
            cos = angles[kind][0]
            shown.rotary = cpu_step.turns(shown, angles[kind], tokens, sizes.dim)
            if cos.numel() != tokens * shown.rotary:
                raise WrongTensor(f"angles {list(cos.shape)} for {tokens} tokens")
        texts, first = (CText * len(parts))(), 0
        for text, part in zip(texts, parts, strict=True):
            places = _places(part.cache)
            places.follow(part.position, part.count, sizes.kv_heads, sizes.dim)
            text.places, text.first, first = places.address, first, first + part.count
            text.tokens, text.position = part.count, part.position
        decoder = self._decoder
        decoder.h = address(h, torch.float32, tokens * sizes.hidden)
        decoder.tokens, decoder.texts = tokens, len(parts)
        decoder.text, self._texts = ctypes.addressof(texts), texts

    def _call(self) -> None:
        if self._run(self._address, torch.get_num_threads(), self._team):
            raise MemoryError


def _places(cache: LayeredCache) -> Places:
    """What was shown of `cache` before, which C need not be told again."""
    if not isinstance(cache.places, Places):
        cache.places = Places(cache.layers)
    return cache.places


def _fill(block: CBlock, weights: BlockWeights, sizes: Sizes) -> None:
    """What does not change from token to token. Raises WrongTensor where sizes disagree."""
    attended, middle = sizes.heads * sizes.dim, weights.down.weight.inputs
    wide = {
        "qkv": (sizes.hidden, attended + 2 * sizes.kv_heads * sizes.dim),
        "out": (attended, sizes.hidden),
        "up": (sizes.hidden, 2 * middle),
        "down": (middle, sizes.hidden),
    }
    for name, shape in wide.items():
        reader: Reader = getattr(weights, name)
        found = reader.weight.inputs, reader.weight.outputs
        if found != shape:
            raise WrongTensor(f"{name} maps {found[0]} to {found[1]}, not {shape[0]} to {shape[1]}")
        made = CReader(threshold=reader.threshold)
        setattr(made, reader.weight.READ_AS, reader.weight.address)
        setattr(block, name, made)
    for name in NORMS:
        size = sizes.dim if name in HEAD_NORMS else sizes.hidden
        block.point(name, getattr(weights, name), torch.float32, size)
    block.middle, block.window = middle, weights.window or 0


@cache
def load() -> ctypes.CDLL:
    """The compiled kernel. Raises NoKernel with the reason."""
    w4a8.check()
    skip_int4.check()
    if not cpu_step.usable():
        raise NoKernel("the kernels of a decode step do not work here")
    structs = (
        *(CDecoder, CBlock, CAngles, CPlace, CText, CReader, cpu_step.CStep, CPacked, CSide),
        *(w4a8.CLinear, skip_int4.CColumns, CPlanes, dense.CDense, attention_prompt.CPrompt),
    )
    lib = library(*SOURCES, structs=structs)
    lib.optim_decode.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    return lib
