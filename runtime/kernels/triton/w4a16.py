"""Packed weights on a GPU: one Triton kernel, from a single token to a prompt.

Layout. K is cut into tiles of SLICE * PER inputs, PER = 32 / bits. Word [tile * SLICE + j, n] has
input tile * SLICE * PER + i * SLICE + j of output n in its i-th field, so that field i of a tile of
words is a ready [SLICE, BLOCK_N] operand for a run of SLICE inputs: no shuffle, and neighbouring
threads read neighbouring words. 3-bit values are kept in 4-bit fields.

Dequantization costs one OR. `magic | v`, read as a float, is v + bias exactly (bf16 0x4300: 128,
fp16 0x6400: 1024). Scale and zero are hoisted out of the sum over a group, which is exact too:

    sum a * (v - zero) * scale = scale * (sum a * (v + bias) - (zero + bias) * sum a)

Up to 4 tokens are multiplied without tensor cores. Sums are float32. K is split over programs where
outputs alone do not fill the card; the parts go to a workspace and are added in order, so that
results do not change from run to run.
"""

from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from optim.runtime.formats.schemes import Scheme
from optim.runtime.kernels.compile import NoKernel
from optim.runtime.kernels.door import FLOATS, Read, check_launch
from optim.runtime.kernels.torch_tiles import by_tiles

SLICE = 16
FEW_TOKENS = 4  # without tensor cores up to here
MANY_TOKENS = 256  # from here on weights are unpacked once and multiplied densely


@dataclass(frozen=True, slots=True)
class Config:
    """Shape of one program, and into how many parts K is split."""

    block_m: int
    block_n: int
    split: int
    warps: int
    stages: int


@triton.jit  # type: ignore[untyped-decorator]
def _field(words, shift: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """One field of each word as v + bias in DTYPE."""
    v = (words >> shift) & ((1 << BITS) - 1)
    if DTYPE == tl.float16:  # noqa: SIM300
        return (v | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
    elif DTYPE == tl.bfloat16 and BITS < 8:  # noqa: SIM300
        return (v | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return ((v | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0).to(DTYPE)


@triton.jit  # type: ignore[untyped-decorator]
def _zero(at, ok, MIDDLE: tl.constexpr, SHIFT: tl.constexpr, STORED: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """zero + bias of N outputs in one group."""
    if STORED:
        return tl.load(at, ok, other=0).to(tl.float32) + SHIFT
    else:
        return tl.full((N,), MIDDLE + SHIFT, dtype=tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _add_product(part, a, b, DOT: tl.constexpr):  # type: ignore[no-untyped-def]
    """part + a b on tensor cores, or each product apart, to be summed over the inputs later."""
    if DOT:
        return tl.dot(a, b, part, input_precision="ieee")
    else:
        return part + a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :]


@triton.jit  # type: ignore[untyped-decorator]
def _matmul(  # type: ignore[no-untyped-def]
    x,  # [M, K]
    words,  # int32 [tiles * SLICE, N]
    scale,  # [groups, N]
    zero,  # uint8 [groups, N], or anything if not HAS_ZERO
    bias,  # [N], or anything if not HAS_BIAS
    out,  # [SPLIT, M, N]
    M,
    N,
    K,
    tiles,
    tiles_each,
    groups,
    slices,  # of a group
    BITS: tl.constexpr,
    MIDDLE: tl.constexpr,  # the zero of symmetric weights
    SHIFT: tl.constexpr,  # the bias of `_field`
    RUN: tl.constexpr,  # slices that surely share a group
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICE: tl.constexpr,
):
    PER: tl.constexpr = 32 // BITS
    DTYPE: tl.constexpr = x.dtype.element_ty
    split = tl.program_id(2)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, SLICE)
    row_ok, col_ok = rows < M, cols < N
    from_x = x + rows[:, None].to(tl.int64) * K
    SHAPE: tl.constexpr = (BLOCK_M, BLOCK_N) if DOT else (BLOCK_M, SLICE, BLOCK_N)
    total = tl.zeros(SHAPE, dtype=tl.float32)
    for tile in range(split * tiles_each, min(split * tiles_each + tiles_each, tiles)):
        at = (tile * SLICE + lane)[:, None].to(tl.int64) * N + cols[None, :]
        packed = tl.load(words + at, col_ok[None, :], other=0, eviction_policy="evict_first")
        for first in tl.static_range(0, PER, RUN):
            group = min((tile * PER + first) // slices, groups - 1)  # the last tile may pass K
            s = tl.load(scale + group * N + cols, col_ok, other=0).to(tl.float32)
            z = _zero(zero + group * N + cols, col_ok, MIDDLE, SHIFT, HAS_ZERO, BLOCK_N)
            part = tl.zeros_like(total)
            sums = tl.zeros((BLOCK_M, SLICE), dtype=tl.float32)
            for i in tl.static_range(first, first + RUN):
                k = (tile * PER + i) * SLICE + lane
                a = tl.load(from_x + k[None, :], row_ok[:, None] & (k < K)[None, :], other=0)
                b = _field(packed, i * BITS, BITS, DTYPE)
                sums += a.to(tl.float32)
                part = _add_product(part, a, b, DOT)
            if DOT:
                total += (part - tl.sum(sums, 1)[:, None] * z[None, :]) * s[None, :]
            else:
                total += (part - sums[:, :, None] * z[None, None, :]) * s[None, None, :]
    y = total if DOT else tl.sum(total, 1)
    if HAS_BIAS:
        added = tl.load(bias + cols, col_ok, other=0).to(tl.float32)
        y += added[None, :] * (split == 0).to(tl.float32)
    to = (split * M + rows)[:, None].to(tl.int64) * N + cols[None, :]
    tl.store(out + to, y, row_ok[:, None] & col_ok[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _reduce(parts, out, count, SPLIT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[i] = the sum of parts[0..SPLIT, i], in order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts + part * count + i, i < count, other=0)
    tl.store(out + i, total, i < count)


def supports(scheme: Scheme, device: torch.device) -> bool:
    """Groups of a multiple of 16, or whole channels; not what only formats of others have."""
    if scheme.offset or scheme.bits not in (2, 3, 4, 8):
        return False
    return device.type == "cuda" and (scheme.group_size % SLICE == 0 or scheme.group_size == -1)


def configure(tokens: int, outputs: int, tiles: int, processors: int) -> Config:
    """Where to start on a card with `processors` multiprocessors: two programs for each."""
    if tokens <= FEW_TOKENS:
        block_m, block_n, warps, stages = triton.next_power_of_2(tokens), 128, 4, 2
    elif tokens <= 16:
        block_m, block_n, warps, stages = 16, 64, 4, 3
    else:
        block_m, block_n, warps, stages = 32 if tokens <= 32 else 64, 64, 4, 3
    programs = triton.cdiv(outputs, block_n) * triton.cdiv(tokens, block_m)
    wanted = triton.next_power_of_2(triton.cdiv(2 * processors, programs))
    split = max(1, min(wanted, 16, tiles))
    return Config(block_m, block_n, split, warps, stages)


class Weight:
    """One linear `[out, in]` in the kernel's layout; call it with `[tokens, in]`."""

    def __init__(
        self, q: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, bias: Tensor | None
    ) -> None:
        self.outputs, self.inputs = q.shape
        self.bits = 4 if scheme.bits == 3 else scheme.bits
        self.middle, self.bias = 1 << (scheme.bits - 1), bias
        self.words = _words(q, self.bits)
        self.tiles = self.words.shape[0] // SLICE
        self.scale = scale.T.contiguous()
        self.zero = None if zero is None else zero.T.contiguous()
        self.slices = max(scheme.group_size // SLICE, 0) or self.tiles * (32 // self.bits)
        self.processors = processors(q.device)

    @property
    def nbytes(self) -> int:
        held = (self.words, self.scale, self.zero, self.bias)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """The weight's rows start..stop: [stop - start, in] in `dtype`."""
        words = self.words[:, start:stop].view(self.tiles, 1, SLICE, -1)
        shifts = torch.arange(0, 32, self.bits, device=words.device).view(1, -1, 1, 1)
        q = (words >> shifts & (1 << self.bits) - 1).view(-1, stop - start)[: self.inputs]
        columns = torch.arange(self.inputs, device=q.device) // (self.slices * SLICE)
        zero = self.middle if self.zero is None else self.zero[columns, start:stop].float()
        weight = (q.float() - zero) * self.scale[columns, start:stop].float()
        return weight.T.to(dtype)

    def __call__(self, x: Tensor, config: Config | None = None) -> Tensor:
        """`[tokens, in]` -> `[tokens, out]` in the dtype of x, bias included."""
        tokens = x.shape[0]
        if config is None and tokens >= MANY_TOKENS:
            y = by_tiles(x, self.outputs, lambda start, stop: self.rows(start, stop, x.dtype))
            return y if self.bias is None else y.add_(self.bias.to(y.dtype))
        config = config or configure(tokens, self.outputs, self.tiles, self.processors)
        y = x.new_empty(tokens, self.outputs)
        if config.split == 1:
            self._launch(x.contiguous(), y, config)
            return y
        parts = x.new_empty(config.split, tokens, self.outputs, dtype=torch.float32)
        self._launch(x.contiguous(), parts, config)
        grid = (triton.cdiv(y.numel(), 1024),)
        _reduce[grid](parts, y, y.numel(), SPLIT=config.split, BLOCK=1024)
        return y

    def _check(self, x: Tensor, out: Tensor, tokens: int, split: int) -> None:
        groups = self.scale.shape[0]
        reads: list[Read] = [
            (x, FLOATS, tokens * self.inputs),
            (self.words, torch.int32, self.tiles * SLICE * self.outputs),
            (self.scale, FLOATS, groups * self.outputs),
            (out, FLOATS, split * tokens * self.outputs),
        ]
        if self.zero is not None:
            reads.append((self.zero, (torch.uint8, *FLOATS), groups * self.outputs))
        if self.bias is not None:
            reads.append((self.bias, FLOATS, self.outputs))
        check_launch(x.device, *reads)

    def _launch(self, x: Tensor, out: Tensor, config: Config) -> None:
        tokens, per = x.shape[0], 32 // self.bits
        self._check(x, out, tokens, config.split)
        columns, rows = (
            triton.cdiv(self.outputs, config.block_n),
            triton.cdiv(tokens, config.block_m),
        )
        _matmul[(columns, rows, config.split)](
            x,
            self.words,
            self.scale,
            self.scale if self.zero is None else self.zero,
            self.scale if self.bias is None else self.bias,
            out,
            tokens,
            self.outputs,
            self.inputs,
            self.tiles,
            triton.cdiv(self.tiles, config.split),
            self.scale.shape[0],
            self.slices,
            BITS=self.bits,
            MIDDLE=self.middle,
            SHIFT=_bias_of(x.dtype, self.bits),
            RUN=gcd(per, self.slices),
            HAS_ZERO=self.zero is not None,
            HAS_BIAS=self.bias is not None,
            DOT=tokens > FEW_TOKENS,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            SLICE=SLICE,
            num_warps=config.warps,
            num_stages=config.stages,
        )


@cache
def check() -> str:
    """Compares the kernel with the formula on this machine's GPU. Raises NoKernel."""
    if not torch.cuda.is_available():
        raise NoKernel("no GPU")
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (72, 160), generator=generator).to(torch.uint8)
    scale = torch.rand(72, 5, generator=generator) + 0.1
    exact = ((q.double() - 8).view(72, 5, 32) * scale.double().unsqueeze(-1)).view(72, 160)
    weight = Weight(q.cuda(), scale.cuda(), None, Scheme(4, 32, True), None)
    for tokens in (1, 3, 17):
        x = torch.randn(tokens, 160, generator=generator).to(torch.float16)
        wanted = x.double() @ exact.T
        error = float((weight(x.cuda()).cpu() - wanted).norm() / wanted.norm())
        if not error < 1e-3:
            raise NoKernel(f"it disagrees with the reference by {error:.1e}")
    return torch.cuda.get_device_name()


def _words(q: Tensor, bits: int) -> Tensor:
    """uint8 [out, in] -> int32 [tiles * SLICE, out], as at the top of this file."""
    outputs, inputs = q.shape
    per = 32 // bits
    padded = torch.nn.functional.pad(q, (0, -inputs % (SLICE * per)))
    fields = padded.T.reshape(-1, per, SLICE, outputs)
    words = torch.zeros(fields.shape[0], SLICE, outputs, dtype=torch.int32, device=q.device)
    for i in range(per):
        words |= fields[:, i].to(torch.int32) << i * bits
    return words.view(-1, outputs)


def _bias_of(dtype: torch.dtype, bits: int) -> int:
    """What `_field` adds to a value."""
    if dtype == torch.float16:
        return 1024
    return 128 if dtype == torch.bfloat16 and bits < 8 else 0


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a card."""
    if device.type != "cuda":
        return 1
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count)
