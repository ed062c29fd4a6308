"""y = W x on a GPU for a few tokens whose small inputs are left out: their weights are not loaded.

Weights lie input by input, so the load of an input's weights is one masked row
of a tile. K is split over programs; the parts go to a workspace and are added in order, so that
results do not change from run to run (TEAL's kernel adds them atomically, in fp16).

    bf16, fp16, fp32    [in, out]
    int4                [in, out / 2]: outputs n and n + 32 of a tile of 64 in a byte; with the sum
                        over a group exact but for rounding: scale * (sum x q - zero * sum x)
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from optim.runtime.formats.schemes import Scheme
from optim.runtime.kernels.door import FLOATS, Read, check_launch

TILE = 64  # outputs that weights are padded to
BYTES = 64  # bytes of a row that one int4 program reads: two tiles
BLOCK_K = 32  # inputs at a time
PROGRAMS = 512  # about how many programs a product is cut into


@triton.jit  # type: ignore[untyped-decorator]
def _dense(  # type: ignore[no-untyped-def]
    x, w, parts, threshold, K, N, stride, share, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * share
    total = tl.zeros([BLOCK_N], tl.float32)
    for at in range(0, share, BLOCK_K):
        k = first + at + tl.arange(0, BLOCK_K)
        a = tl.load(x + k, mask=(k < K) & (k < first + share), other=0.0).to(tl.float32)
        used = ((tl.abs(a) > threshold) | (a != a))[:, None] & (n < N)[None, :]
        rows = tl.load(w + k[:, None] * stride + n[None, :], mask=used, other=0.0)
        total += tl.sum(rows.to(tl.float32) * a[:, None], 0)
    tl.store(parts + tl.program_id(1) * N + n, total, mask=n < N)


@triton.jit  # type: ignore[untyped-decorator]
def _int4(  # type: ignore[no-untyped-def]
    x, w, scale, zero, parts, threshold, K, padded, share,
    GROUP: tl.constexpr, ZEROS: tl.constexpr, BLOCK_K: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) * BYTES + tl.arange(0, BYTES)
    low = b // 32 * 64 + b % 32
    inside = b < padded // 2
    first = tl.program_id(1) * share
    low_total = tl.zeros([BYTES], tl.float32)
    high_total = tl.zeros([BYTES], tl.float32)
    for at in range(0, share, BLOCK_K):
        k = first + at + tl.arange(0, BLOCK_K)
        a = tl.load(x + k, mask=(k < K) & (k < first + share), other=0.0).to(tl.float32)
        a = tl.where((tl.abs(a) > threshold) | (a != a), a, 0.0)
        used = (a != 0)[:, None] & inside[None, :]
        rows = tl.load(w + k[:, None] * (padded // 2) + b[None, :], mask=used, other=0)
        some = tl.sum(a, 0)
        place = (first + at) // GROUP * padded + low
        s_low = tl.load(scale + place, mask=inside, other=0.0).to(tl.float32)
        s_high = tl.load(scale + place + 32, mask=inside, other=0.0).to(tl.float32)
        z_low, z_high = 8.0, 8.0
        if ZEROS:
            z_low = tl.load(zero + place, mask=inside, other=0).to(tl.float32)
            z_high = tl.load(zero + place + 32, mask=inside, other=0).to(tl.float32)
        low_total += s_low * (tl.sum((rows & 15).to(tl.float32) * a[:, None], 0) - z_low * some)
        high_total += s_high * (tl.sum((rows >> 4).to(tl.float32) * a[:, None], 0) - z_high * some)
    base = parts + tl.program_id(1) * padded
    tl.store(base + low, low_total, mask=inside)
    tl.store(base + low + 32, high_total, mask=inside)


class Gather:
    """A linear held input by input on a GPU; the same calls as skip_dense.Columns."""

    def __init__(self, outputs: int, tensors: dict[str, Tensor], group: int) -> None:
        """`tensors` as one of the layouts below; `group` 0: not int4, else inputs of a scale."""
        self.inputs, self.outputs = tensors["weight"].shape[0], outputs
        self.tensors, self.group, self.bias = tensors, group, tensors.get("bias")
        self.used = torch.zeros((), dtype=torch.int64, device=tensors["weight"].device)
        self.calls = 0

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def wide(self, part: slice) -> Tensor:
        """Some inputs' weights as floats: `[part, out]`."""
        weight = self.tensors["weight"][part]
        if not self.group:
            return weight[:, : self.outputs]
        tiles = weight.view(len(weight), -1, 1, TILE // 2)
        q = torch.cat((tiles & 15, tiles >> 4), 2).flatten(1)[:, : self.outputs].float()
        of = torch.arange(self.inputs, device=weight.device)[part] // self.group
        scale, zero = self.tensors["scale"], self.tensors.get("zero")
        middle = 8.0 if zero is None else zero[:, : self.outputs].float()[of]
        return (q - middle) * scale[:, : self.outputs].float()[of]

    def __call__(self, x: Tensor, threshold: float = -1.0) -> Tensor:
        """x `[in]` -> `[out]` in its type, without the inputs up to `threshold` in size."""
        weight = self.tensors["weight"]
        padded = weight.shape[1] * (2 if self.group else 1)
        block = min(BLOCK_K, self.group) if self.group else BLOCK_K
        wide = -(-weight.shape[1] // BYTES)
        splits = max(1, min(-(-self.inputs // block), PROGRAMS // wide))
        share = -(-self.inputs // (splits * block)) * block
        splits = -(-self.inputs // share)
        parts = torch.empty(splits, padded, dtype=torch.float32, device=x.device)
        kind = torch.uint8 if self.group else FLOATS
        reads: list[Read] = [
            (x, FLOATS, self.inputs),
            (weight, kind, self.inputs * weight.shape[1]),
        ]
        if self.group:
            scale, zero = self.tensors["scale"], self.tensors.get("zero")
            count = -(-self.inputs // self.group) * padded
            reads.append((scale, torch.bfloat16, count))
            reads += [] if zero is None else [(zero, torch.uint8, count)]
        check_launch(x.device, *reads)
        if self.group:
            _int4[(wide, splits)](
                x, weight, scale, scale if zero is None else zero, parts, threshold, self.inputs,
                padded, share, GROUP=self.group, ZEROS=zero is not None, BLOCK_K=block, BYTES=BYTES,
            )  # fmt: skip
        else:
            _dense[(wide, splits)](
                x, weight, parts, threshold, self.inputs, padded, padded, share,
                BLOCK_K=block, BLOCK_N=BYTES,
            )  # fmt: skip
        self.used += (x.abs() > threshold).sum()
        self.calls += 1
        y = parts.sum(0)[: self.outputs]
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def dense_layout(weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    """`weight` `[out, in]` -> `[in, padded out]`, and `bias` float32 if there is one."""
    tensors = {"weight": _padded(weight.T)}
    return tensors if bias is None else tensors | {"bias": bias.float().contiguous()}


def int4_layout(
    q: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, bias: Tensor | None
) -> dict[str, Tensor]:
    """`weight` uint8 `[in, padded out / 2]`, `scale` bf16 and `zero` uint8 `[groups, padded out]`.

    `q` uint8 `[out, in]` below 16, scale and zero `[out, groups]`; without `zero` it is 8.
    """
    tiles = _padded(q.T).view(q.shape[1], -1, 2, TILE // 2)
    weight = (tiles[:, :, 0] | tiles[:, :, 1] << 4).flatten(1).contiguous()
    tensors = {"weight": weight, "scale": _padded(scale.to(torch.bfloat16).T)}
    middle = 2 ** (scheme.bits - 1)
    if zero is not None or middle != 8:
        zeros = torch.full_like(scale, middle, dtype=torch.uint8) if zero is None else zero
        tensors["zero"] = _padded(zeros.to(torch.uint8).T)
    return tensors if bias is None else tensors | {"bias": bias.float().contiguous()}


def _padded(rows: Tensor) -> Tensor:
    """`[n, m]` contiguous, m filled up with zeros to whole tiles."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % TILE)).contiguous()
