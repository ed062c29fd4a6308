"""Packed weights on a CPU through `w4a8.c`: integer dot products, activations in 8 bits.

Each run of 16, 32 or 64 activations of a token is rounded to int8 with its own scale; everything
else is exact up to float32 rounding. `reference` is the same computation in torch, in float64.
The relative error this adds to a layer's output is about 0.5 % (tests/runtime/kernels).
"""

import ctypes
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from optim.runtime.formats.pack_quantized import exact
from optim.runtime.formats.schemes import Scheme
from optim.runtime.kernels import huge_pages
from optim.runtime.kernels.compile import NoKernel, library, team
from optim.runtime.kernels.door import Struct, WrongTensor, address

ALIKE = 1 << 30  # tokens at once that each get what they get alone: any
SCALES = (torch.float32, torch.bfloat16, torch.float16)  # by their number in C


class CLinear(Struct):
    """`Linear` of optim.h."""

    NAME = "Linear"

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "bits", "chunk", "chunks")),
        *((name, ctypes.c_int64) for name in ("scales", "scale_type")),
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "zero", "offset")),
        ("middle", ctypes.c_float),
        ("bias", ctypes.c_void_p),
    )


def supports(scheme: Scheme, device: torch.device) -> bool:
    """Groups of a multiple of 16, or whole channels."""
    return device.type == "cpu" and (scheme.group_size % 16 == 0 or scheme.group_size == -1)


def chunk_of(scheme: Scheme) -> int:
    """How many activations share a scale: 64, or fewer where the weights' group asks for it."""
    if scheme.group_size == -1:
        return 64
    return next(chunk for chunk in (64, 32, 16) if scheme.group_size % chunk == 0)


class Weight:
    """One linear `[out, in]` in the kernel's layout; call it with `[tokens, in]`.

    `q` is uint8 `[out, in]`, or of 4 bits the words they are stored in, int32 `[out, in / 8]`;
    `zero` are zero points, or the floats that a scheme with an offset adds.
    """

    READ_AS: ClassVar[str] = "whole"

    def __init__(
        self, q: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, bias: Tensor | None
    ) -> None:
        lib = load()
        self.outputs, self.inputs = q.shape[0], q.shape[1] * (8 if q.dtype == torch.int32 else 1)
        rows, chunk = lib.optim_rows(), chunk_of(scheme)
        stored = 4 if scheme.bits <= 4 else 8
        flip = lib.optim_flip() if stored == 8 else 0
        self.weight = _blocks(q, stored, -(-self.inputs // chunk) * chunk, flip)
        if scale.dtype == torch.float16 and not lib.optim_half_scales():
            scale = scale.float()
        chunks, scales = -(-self.inputs // chunk), scale.shape[1]
        if scale.shape[0] != self.outputs or chunks % scales:
            raise WrongTensor(f"scales {list(scale.shape)} of a weight {list(q.shape)}")
        self.scale = _per_block(scale, rows)
        self.zero = self.offset = None
        if zero is not None and scheme.offset:
            self.offset = _per_block(zero.to(scale.dtype), rows)
        elif zero is not None:
            self.zero = _per_block(zero, rows)
        self.bias = None if bias is None else _per_block(bias.float().unsqueeze(1), rows)
        self._run, self._team, self._rows = lib.optim_linear, team(), rows
        self._scheme, self._flip = scheme, flip
        self.layer = CLinear(
            inputs=self.inputs,
            bits=stored,
            chunk=chunk,
            chunks=chunks,
            scales=scales,
            scale_type=SCALES.index(scale.dtype),
            middle=2.0 ** (scheme.bits - 1),
        )
        self.point()

    def point(self) -> None:
        """Let C see the tensors as they are now."""
        layer = self.layer
        blocks = -(-self.outputs // self._rows)
        words = layer.chunks * layer.chunk * layer.bits // 32
        scale = SCALES[layer.scale_type]
        layer.outputs = self.outputs
        layer.point("weight", self.weight, torch.int32, blocks * words * self._rows)
        layer.point("scale", self.scale, scale, blocks * layer.scales * self._rows)
        layer.point("zero", self.zero, torch.uint8, blocks * layer.scales * self._rows)
        layer.point("offset", self.offset, scale, blocks * layer.scales * self._rows)
        layer.point("bias", self.bias, torch.float32, blocks * self._rows)
        self.address = ctypes.addressof(layer)

    @property
    def nbytes(self) -> int:
        held = (self.weight, self.scale, self.zero, self.offset, self.bias)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def picked(self, rows: Tensor) -> Tensor:
        """The weight's `rows` (int64 `[n]`), as floats `[n, in]`: what an embedding looks up."""
        block, lane = rows // self._rows, rows % self._rows
        codes = self.weight[block, :, lane].view(torch.uint8).view(len(rows), -1, 4)
        if self.layer.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], 2)
        q = codes.reshape(len(rows), -1)[:, : self.inputs] ^ self._flip
        zero = self.offset if self.zero is None else self.zero
        shift = None if zero is None else zero[block, :, lane]
        return exact(q, self.scale[block, :, lane].float(), shift, self._scheme)

    def __call__(self, x: Tensor) -> Tensor:
        """`[tokens, in]` -> float32 `[tokens, out]`, bias included."""
        x, tokens, threads = x.float().contiguous(), x.shape[0], torch.get_num_threads()
        y = torch.empty(tokens, self.outputs)
        given = address(x, torch.float32, tokens * self.inputs)
        made = address(y, torch.float32, tokens * self.outputs)
        if self._run(self.address, given, made, tokens, threads, self._team):
            raise MemoryError
        return y


def reference(x: Tensor, q: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """What the kernel computes, in float64: `[tokens, in]` -> `[tokens, out]`."""
    chunk = chunk_of(scheme)
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % chunk))
    parts = padded.view(x.shape[0], -1, chunk)
    peak = parts.abs().amax(-1, keepdim=True)
    scaled = parts * torch.where(peak > 0, 127 / peak, 0)
    rounded = (scaled + 0.5 * torch.where(scaled >= 0, 1, -1)).trunc().double() * (peak / 127)
    weight = exact(q, scale.double(), zero, scheme)
    return rounded.view(x.shape[0], -1)[:, : x.shape[1]] @ weight.T


@cache
def load() -> ctypes.CDLL:
    """The compiled kernel, compared with `reference`. Raises NoKernel with the reason."""
    lib = library("w4a8", structs=(CLinear,))
    lib.optim_linear.argtypes = [
        *[ctypes.c_void_p] * 3,
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_void_p,
    ]
    sizes = [*[ctypes.c_int64] * 3, *[ctypes.c_int] * 4]
    lib.optim_repack.argtypes = [*[ctypes.c_void_p] * 2, *sizes, ctypes.c_void_p]
    lib.optim_repack.restype = None
    lib.optim_name.restype = ctypes.c_char_p
    return lib


@cache
def check() -> str:
    """Runs the kernel on small layers of every kind; returns the instruction set it uses.

    Raises NoKernel if it cannot be built or disagrees with `reference`.
    """
    name = str(load().optim_name().decode())
    generator = torch.Generator().manual_seed(0)
    for bits in (4, 8):
        for group in (16, 32, 64, -1):
            for symmetric, offset in ((True, False), (False, False), (False, True)):
                error = _error(Scheme(bits, group, symmetric, offset), generator)
                if not error < 1e-5:
                    raise NoKernel(f"{name} disagrees with the reference by {error:.1e}")
    return name


def _error(scheme: Scheme, generator: torch.Generator) -> float:
    inputs, outputs, top = 192, 21, 1 << scheme.bits
    q = torch.randint(0, top, (outputs, inputs), generator=generator).to(torch.uint8)
    scale = torch.rand(outputs, scheme.groups(inputs), generator=generator) + 0.1
    scale = scale.to(torch.float16 if scheme.offset else torch.float32)
    zero = torch.randint(0, top, scale.shape, generator=generator).to(torch.uint8)
    shift = -zero * scale if scheme.offset else zero
    kept = None if scheme.symmetric else shift
    x = torch.randn(5, inputs, generator=generator)
    wanted = reference(x, q, scale, kept, scheme)
    got = Weight(q, scale, kept, scheme, None)(x)
    return float((got - wanted).abs().max() / wanted.abs().max())


def _blocks(q: Tensor, bits: int, columns: int, flip: int) -> Tensor:
    """uint8 [out, in] or words -> int32 [blocks, columns*bits/32, rows]: 4 or 8 inputs a word.

    A word of 4 bits has inputs 0 to 3 in the low halves of its bytes, 4 to 7 in the high ones.
    """
    lib, words, q = load(), columns * bits // 32, q.contiguous()
    outputs, stored = q.shape[0], q.shape[1] * q.element_size()
    if stored > words * (8 if q.dtype == torch.uint8 and bits == 4 else 4):
        raise WrongTensor(f"{list(q.shape)} of {q.dtype} in {columns} columns")
    shape = -(-outputs // lib.optim_rows()), words, lib.optim_rows()
    blocks = huge_pages.empty(shape, torch.int32)
    packed = q.dtype == torch.int32
    given = address(q, torch.int32 if packed else torch.uint8, q.numel())
    made = address(blocks, torch.int32, blocks.numel())
    threads = torch.get_num_threads()
    lib.optim_repack(given, made, outputs, stored, words, bits, packed, flip, threads, team())
    return blocks


def _per_block(values: Tensor, rows: int) -> Tensor:
    """[out, groups] -> [blocks, groups, rows]."""
    padded = torch.nn.functional.pad(values, (0, 0, 0, -values.shape[0] % rows))
    blocks = padded.view(-1, rows, values.shape[1]).transpose(1, 2)
    return huge_pages.empty(blocks.shape, values.dtype).copy_(blocks)
