"""bf12 on a GPU: the product over 12-bit planes, fused, and the planes expanded to bf16.

The window form: of 15 neighbouring exponents B .. B + 14, `code` = e - B + 1, and 0 for zeros and
for escapes, which are added after. A weight is sign, code and mantissa put together as a bf16 whose
exponent field is the code: 2^(B - 1) times too small, exactly. So x is multiplied by 2^64, the sum
by 2^(B - 65), and no weight is touched more than that: powers of two round nothing.

Eight weights 8g .. 8g + 7 are three int32 words. Weight j < 4 and weight j + 4 make a pair, in the
low and the high half of a word, so that a shift and a mask serve two weights:

    codes [rows, groups]     nibble j: the code of weight j; nibble 4 + j: that of weight 4 + j
    rest [2, rows, groups]   sign and mantissa; word 0 holds pairs 0 and 1, word 1 pairs 2 and 3:
                             byte 0 and 2 are one pair, byte 1 and 3 the other

Speed on a card is not measured yet.
"""

from functools import cache

import torch
import torch.nn.functional as F
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from optim.runtime.kernels.compile import NoKernel
from optim.runtime.kernels.door import FLOATS, check_launch

WINDOW = 15
FEW_TOKENS, SOME_TOKENS = 4, 64  # sums in registers; tensor cores on tiles; beyond: expand
SCALE = 2.0**64
ROWS, GROUPS = 16, 64  # of a tile of the sums
DOT_ROWS, DOT_GROUPS = 64, 32

SIGNS = tl.constexpr(-2147450880)  # 0x80008000
CODES = tl.constexpr(0x07800780)
MANTISSAS = tl.constexpr(0x007F007F)
HIGH = tl.constexpr(-65536)  # 0xffff0000


@triton.jit  # type: ignore[untyped-decorator]
def _pair(codes, rest, i: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pair i of a group as two bf16 in one int32: weight i low, weight i + 4 high."""
    bytes = rest if i % 2 == 0 else rest >> 8
    shift: tl.constexpr = 7 - 4 * i
    code = codes << shift if shift >= 0 else codes >> -shift
    return (bytes << 8) & SIGNS | bytes & MANTISSAS | code & CODES


@triton.jit
def _escapes(total, row_ok, rows, tokens, token_ok, escapes, at, values, x, K):  # type: ignore[no-untyped-def]
    """Adds the weights that the window lacks; total [tokens, rows]."""
    begin = tl.load(escapes + rows, row_ok, other=0)
    end = tl.load(escapes + rows + 1, row_ok, other=0)
    for i in range(0, tl.max(end - begin, 0)):
        e = begin + i
        there = row_ok & (e < end)
        column = tl.load(at + e, there, other=0)
        value = tl.load(values + e, there, other=0).to(tl.float32)
        from_x = x + tokens[:, None].to(tl.int64) * K + column[None, :]
        a = tl.load(from_x, token_ok[:, None] & there[None, :], other=0).to(tl.float32)
        total += tl.where(there, value, 0.0)[None, :] * a
    return total


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    x, turned, codes, rest, escapes, at, values, y, M, N, K, G, factor,
    DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] W^T; turned [8, G, M] is x scaled, column 8 g + j at [j, g]."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok, token_ok = rows < N, tokens < M
    where = rows[:, None].to(tl.int64) * G
    if DOT:
        total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_G), dtype=tl.float32)
    for first in range(0, G, BLOCK_G):
        g = first + tl.arange(0, BLOCK_G)
        ok = row_ok[:, None] & (g < G)[None, :]
        word = tl.load(codes + where + g[None, :], ok, other=0)
        for i in tl.static_range(4):
            bytes = tl.load(rest + (i // 2) * N.to(tl.int64) * G + where + g[None, :], ok, other=0)
            pair = _pair(word, bytes, i)
            for j in tl.static_range(i, 8, 4):
                w = pair << 16 if j < 4 else pair & HIGH
                w = w.to(tl.float32, bitcast=True)
                if DOT:
                    from_x = turned + (j * G + g)[:, None] * M + tokens[None, :]
                    a = tl.load(from_x, (g < G)[:, None] & token_ok[None, :], other=0)
                    total = tl.dot(w.to(a.dtype), a, total, input_precision="ieee")
                else:
                    from_x = turned + (j * G + g)[None, :] * M + tokens[:, None]
                    a = tl.load(from_x, (g < G)[None, :] & token_ok[:, None], other=0)
                    total += w[None, :, :] * a.to(tl.float32)[:, None, :]
    sums = tl.trans(total) if DOT else tl.sum(total, 2)
    sums = sums * factor
    sums = _escapes(sums, row_ok, rows, tokens, token_ok, escapes, at, values, x, K)
    to = y + tokens[:, None].to(tl.int64) * N + rows[None, :]
    tl.store(to, sums, token_ok[:, None] & row_ok[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _expand(codes, rest, out, N, G, K, added, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """out int16 [N, K]: the bf16 patterns, escapes as zeros. `added`: B - 1 in both exponents."""
    row = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(codes + row * G + g, g < G, other=0)
    for i in tl.static_range(4):
        bytes = tl.load(rest + ((i // 2) * N + row) * G + g, g < G, other=0)
        pair = _pair(word, bytes, i)
        some = pair & CODES
        low = tl.where((some & 0xFFFF) != 0, added & 0xFFFF, 0)
        high = tl.where((some >> 16) != 0, added & HIGH, 0)
        pair += low | high  # no carry leaves an exponent: code + B - 1 is below 256
        for j in tl.static_range(i, 8, 4):
            bits = pair if j < 4 else pair >> 16
            tl.store(out + row * K + g * 8 + j, bits.to(tl.int16), g * 8 + j < K)


class Weight:
    """A bf16 matrix `[out, in]` as planes on its device; call it with `[tokens, in]`."""

    def __init__(self, weight: Tensor) -> None:
        self.outputs, self.inputs = weight.shape
        bits = weight.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
        self.base = _window(bits >> 7 & 0xFF)
        code = (bits >> 7 & 0xFF) - self.base + 1
        inside = (code >= 1) & (code <= WINDOW)
        zero = (bits & 0x7FFF) == 0
        row, self.at = (~inside & ~zero).nonzero(as_tuple=True)
        self.at = self.at.to(torch.int32)
        self.values = weight[row, self.at.long()]
        counts = torch.bincount(row, minlength=self.outputs)
        self.escapes = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        rest = (bits >> 8 & 0x80 | bits & 0x7F).where(inside | zero, 0)
        self.codes, self.rest = _words(code.where(inside, 0), rest)

    @property
    def nbytes(self) -> int:
        held = (self.codes, self.rest, self.escapes, self.at, self.values)
        return sum(tensor.nbytes for tensor in held)

    @property
    def shape(self) -> tuple[int, int]:
        return self.outputs, self.inputs

    def __getitem__(self, rows: slice) -> Tensor:
        """Some rows: bf16 `[n, in]`."""
        start, stop, _ = rows.indices(self.outputs)
        return self.take(torch.arange(start, stop, device=self.codes.device))

    def take(self, ids: Tensor) -> Tensor:
        """Rows of the matrix: bf16 `[..., in]` for int64 `ids`."""
        flat = ids.reshape(-1)
        codes, rest = self.codes[flat], self.rest[:, flat].contiguous()
        out = torch.empty(len(flat), self.inputs, dtype=torch.int16, device=codes.device)
        added = (self.base - 1) << 7
        if len(flat):
            size = codes.numel()
            check_launch(codes.device, (codes, torch.int32, size), (rest, torch.int32, 2 * size))
            grid = (len(flat), triton.cdiv(codes.shape[1], 256))
            whole = added << 16 | added
            _expand[grid](codes, rest, out, *codes.shape, self.inputs, whole, BLOCK=256)
        begin = self.escapes[flat].long()
        count = self.escapes[flat + 1].long() - begin
        row = torch.repeat_interleave(torch.arange(len(flat), device=ids.device), count)
        before = F.pad(count.cumsum(0), (1, 0))[:-1]
        e = torch.arange(len(row), device=ids.device) - before[row] + begin[row]
        out[row, self.at[e].long()] = self.values[e].view(torch.int16)
        return out.view(torch.bfloat16).view(*ids.shape, self.inputs)

    def __call__(self, x: Tensor) -> Tensor:
        """`[tokens, in]` -> `[tokens, out]` in the dtype of x."""
        tokens = x.shape[0]
        dot = tokens > FEW_TOKENS
        if tokens > SOME_TOKENS:
            return F.linear(x, self[:].to(x.dtype))
        x = x.contiguous()
        groups = self.codes.shape[1]
        scaled = (x if x.dtype == torch.bfloat16 and dot else x.float()) * SCALE
        turned = F.pad(scaled, (0, groups * 8 - self.inputs)).view(tokens, groups, 8)
        y = x.new_empty(tokens, self.outputs)
        block_m = max(16, triton.next_power_of_2(tokens)) if dot else triton.next_power_of_2(tokens)
        block_n = DOT_ROWS if dot else ROWS
        grid = (triton.cdiv(self.outputs, block_n), triton.cdiv(tokens, block_m))
        turned, count = turned.permute(2, 1, 0).contiguous(), self.outputs * groups
        check_launch(
            x.device,
            (x, FLOATS, tokens * self.inputs),
            (turned, FLOATS, tokens * groups * 8),
            (self.codes, torch.int32, count),
            (self.rest, torch.int32, 2 * count),
            (self.escapes, torch.int32, self.outputs + 1),
            (self.at, torch.int32, len(self.values)),
        )
        _product[grid](
            x,
            turned,
            *(self.codes, self.rest, self.escapes, self.at, self.values, y),
            *(tokens, self.outputs, self.inputs, groups, 2.0 ** (self.base - 65)),
            DOT=dot,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_G=DOT_GROUPS if dot else GROUPS,
        )
        return y


@cache
def check() -> str:
    """Compares product and expansion with torch on this machine's GPU. Raises NoKernel."""
    if not torch.cuda.is_available():
        raise NoKernel("no GPU")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(71, 133, generator=generator).mul(0.05).to(torch.bfloat16)
    weight[3, 5] = 1e20
    planes = Weight(weight.cuda())
    if not torch.equal(planes[:].cpu().view(torch.int16), weight.view(torch.int16)):
        raise NoKernel("the planes do not expand to the weight")
    weight[3, 5] = 1
    planes = Weight(weight.cuda())
    for tokens in (1, 3, 17):
        x = torch.randn(tokens, 133, generator=generator).to(torch.bfloat16)
        wanted = x.double() @ weight.double().T
        error = float((planes(x.cuda()).cpu() - wanted).norm() / wanted.norm())
        if not error < 1e-2:
            raise NoKernel(f"it disagrees with the reference by {error:.1e}")
    return torch.cuda.get_device_name()


def _window(exponents: Tensor) -> int:
    """The first of the 15 neighbouring exponents that hold the most weights; 0 is for zeros."""
    counts = torch.bincount(exponents.reshape(-1), minlength=256).float()
    counts[0] = 0
    sums = counts.unfold(0, WINDOW, 1).sum(1)[1:242]
    return int(sums.argmax()) + 1


def _words(code: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """int32 `[rows, cols]` of 4 and 8 bits -> codes `[rows, groups]`, rest `[2, rows, groups]`."""
    pad = -code.shape[1] % 8
    code, rest = (F.pad(t, (0, pad)).view(len(t), -1, 8) for t in (code, rest))
    codes = torch.zeros(code.shape[:2], dtype=torch.int32, device=code.device)
    for j in range(8):
        codes |= code[..., j] << 4 * j
    places = ((0, 1, 4, 5), (2, 3, 6, 7))  # the weights of each word, byte by byte
    made = torch.zeros(2, *codes.shape, dtype=torch.int32, device=code.device)
    for word, weights in zip(made, places, strict=True):
        for byte, j in enumerate(weights):
            word |= rest[..., j] << 8 * byte
    return codes, made
