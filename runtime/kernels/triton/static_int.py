"""Static integers on a GPU: a norm that emits codes, nibbles times codes, the middle of an MLP.

Products are 8-bit (int8 tensor cores): no GPU since Hopper multiplies 4 bits, so 4-bit weights are
stored as such and unpacked in registers, and 4-bit codes travel as int8. Weights are unsigned:

    y_nm = scale_n * (sum_k u_nk code_mk - 8 R_m) + bias_n,        R_m = sum_k code_mk

Byte b of a row has columns b and b + K/2: a run of bytes meets two contiguous runs of codes, and
nothing is interleaved. The weight is the left operand: tokens are the columns, and few of them
waste less. From MANY_TOKENS on, nibbles are unpacked once and multiplied by `torch._int_mm`.
"""

from functools import cache

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from optim.runtime.formats.static_int import accumulate, limits, pack_nibbles, unpack_nibbles
from optim.runtime.kernels.compile import NoKernel
from optim.runtime.kernels.door import FLOATS, check_launch

FEW_TOKENS = 4  # without tensor cores up to here
MANY_TOKENS = 512


@triton.jit  # type: ignore[untyped-decorator]
def _norm_codes(  # type: ignore[no-untyped-def]
    x,  # [M, N]
    index,  # int32 [K], or anything if not SPLIT
    gain,  # float32 [K]
    offset,  # float32 [K]
    codes,  # int8 [M, K]
    sums,  # int32 [M]
    N,
    K,
    eps,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    h = tl.load(x + row * N + n, n < N, other=0).to(tl.float32)
    r = tl.rsqrt(tl.sum(h * h, 0) / N + eps)
    k = tl.arange(0, BLOCK_K)
    ok = k < K
    at = tl.load(index + k, ok, other=0) if SPLIT else k
    z = tl.load(x + row * N + at, ok, other=0).to(tl.float32) * r
    z = z * tl.load(gain + k, ok, other=0) + tl.load(offset + k, ok, other=0)
    q = tl.minimum(tl.maximum(tl.floor(z), LOW), HIGH)
    q = tl.where(ok, q, 0).to(tl.int32)
    tl.store(codes + row * K + k, q.to(tl.int8), ok)
    tl.store(sums + row, tl.sum(q, 0))


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    packed,  # uint8 [N, H], H = K / 2
    codes,  # int8 [M, K]
    sums,  # int32 [M]
    out,  # int32 [M, N]
    M,
    N,
    H,
    DOT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok, col_ok = rows < N, cols < M
    from_w = packed + rows[:, None].to(tl.int64) * H
    from_q = codes + cols[None, :].to(tl.int64) * 2 * H
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for start in range(0, H, BLOCK_H):
        k = start + tl.arange(0, BLOCK_H)
        w = tl.load(from_w + k[None, :], row_ok[:, None] & (k < H)[None, :], other=0)
        ok = (k < H)[:, None] & col_ok[None, :]
        low = tl.load(from_q + k[:, None], ok, other=0)
        high = tl.load(from_q + H + k[:, None], ok, other=0)
        first, second = (w & 15).to(tl.int8), (w >> 4).to(tl.int8)
        if DOT:
            acc = tl.dot(first, low, acc, out_dtype=tl.int32)
            acc = tl.dot(second, high, acc, out_dtype=tl.int32)
        else:
            acc += tl.sum(first.to(tl.int32)[:, :, None] * low.to(tl.int32)[None, :, :], 1)
            acc += tl.sum(second.to(tl.int32)[:, :, None] * high.to(tl.int32)[None, :, :], 1)
    acc -= 8 * tl.load(sums + cols, col_ok, other=0)[None, :]
    to = out + cols[None, :].to(tl.int64) * N + rows[:, None]
    tl.store(to, acc, row_ok[:, None] & col_ok[None, :])


def norm_codes(
    x: Tensor, gain: Tensor, offset: Tensor, index: Tensor | None, eps: float, bits: int
) -> tuple[Tensor, Tensor]:
    """RMSNorm and quantization of `x` `[M, N]`: int8 codes `[M, K]` and their sums int32 `[M]`."""
    rows, width = x.shape
    columns, (low, high) = gain.shape[0], limits(bits)
    codes = torch.empty(rows, columns, dtype=torch.int8, device=x.device)
    sums = torch.empty(rows, dtype=torch.int32, device=x.device)
    x = x.contiguous()
    check_launch(
        x.device, (x, FLOATS, rows * width), (gain, FLOATS, columns), (offset, FLOATS, columns)
    )
    if index is not None:
        check_launch(x.device, (index, (torch.int64, torch.int32), columns))
    _norm_codes[(rows,)](
        x,
        gain if index is None else index,
        gain,
        offset,
        codes,
        sums,
        width,
        columns,
        eps,
        LOW=low,
        HIGH=high,
        SPLIT=index is not None,
        BLOCK_N=triton.next_power_of_2(width),
        BLOCK_K=triton.next_power_of_2(columns),
    )
    return codes, sums


def product(codes: Tensor, sums: Tensor, packed: Tensor) -> Tensor:
    """int8 codes `[M, K]`, their sums, nibbles `[N, K/2]` -> int32 `[M, N]`, exact."""
    tokens, outputs = codes.shape[0], packed.shape[0]
    if tokens >= MANY_TOKENS and codes.is_cuda:
        return _unpacked_once(codes, packed)
    out = torch.empty(tokens, outputs, dtype=torch.int32, device=codes.device)
    dot = tokens > FEW_TOKENS
    block_m = 16 if dot else triton.next_power_of_2(tokens)
    block_m = min(64, triton.next_power_of_2(tokens)) if tokens > 16 else block_m
    block_n, block_h = (64, 64) if dot else (16, 128)
    grid = triton.cdiv(outputs, block_n), triton.cdiv(tokens, block_m)
    half, codes = packed.shape[1], codes.contiguous()
    check_launch(
        codes.device,
        (packed, torch.uint8, outputs * half),
        (codes, torch.int8, tokens * 2 * half),
        (sums, torch.int32, tokens),
    )
    _product[grid](
        packed,
        codes,
        sums,
        out,
        tokens,
        outputs,
        half,
        DOT=dot,
        BLOCK_N=block_n,
        BLOCK_M=block_m,
        BLOCK_H=block_h,
    )
    return out


def whole(codes: Tensor, packed: Tensor) -> Tensor:
    """`product` with the sums taken here."""
    return product(codes, codes.sum(1, dtype=torch.int32), packed)


def _unpacked_once(codes: Tensor, packed: Tensor) -> Tensor:
    """A long prompt: weights as int8 for the length of one call, and the library's product."""
    wide = unpack_nibbles(packed, codes.shape[1]).to(torch.int8) - 8
    rows = torch.nn.functional.pad(wide, (0, -codes.shape[1] % 8, 0, -wide.shape[0] % 8))
    left = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8))
    return torch._int_mm(left, rows.T)[:, : packed.shape[0]]


@cache
def check() -> str:
    """Compares the product with exact integers on this machine's GPU. Raises NoKernel."""
    if not torch.cuda.is_available():
        raise NoKernel("no GPU")
    generator = torch.Generator().manual_seed(0)
    u = torch.randint(0, 16, (72, 160), generator=generator, dtype=torch.uint8)
    for tokens in (1, 3, 17, MANY_TOKENS):
        codes = torch.randint(-128, 128, (tokens, 160), generator=generator).to(torch.int8)
        sums = codes.sum(1, dtype=torch.int32).cuda()
        got = product(codes.cuda(), sums, pack_nibbles(u).cuda()).cpu()
        if not torch.equal(got, accumulate(codes, u)):
            raise NoKernel("its integers are not those of the reference")
    x = torch.randn(3, 160, generator=generator)
    gain, offset = torch.full((160,), 3.0), torch.full((160,), 0.5)
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    wanted = (normed * gain + offset).floor().clamp(*limits(4))
    got = norm_codes(x.cuda(), gain.cuda(), offset.cuda(), None, 1e-5, 4)[0].cpu()
    if not float((got.float() != wanted).float().mean()) < 0.01:  # a tie may fall either way
        raise NoKernel("its norm emits other codes than the reference")
    return torch.cuda.get_device_name()
