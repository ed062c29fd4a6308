"""Attention of one new token a row, whose place in the cache is read from the device (Triton).

Nothing here depends on the place in Python, so that a recorded step can be replayed token after
token. Keys are split over programs where rows do not fill the card (flash decoding, Dao et al.
2023); each leaves its largest score, the mass under it and the weighted values, and `_combine` adds
the parts in order, so that results do not change from run to run.

Keys and values are as they were computed, or packed as cache/quantized.py says. A packed key is
never made whole: q . (step * codes + low) = step * (q . codes) + low * sum(q).
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from optim.runtime.cache.attention import Rule
from optim.runtime.cache.device_position import Store, reference
from optim.runtime.kernels.compile import NoKernel
from optim.runtime.kernels.door import FLOATS, check_launch
from optim.runtime.kernels.triton.w4a16 import processors

TILE = 64  # keys at a time
ROWS = 16  # query heads of a group, as tensor cores want them
MOST_PARTS = 32
NO_WINDOW = 1 << 40


@triton.jit  # type: ignore[untyped-decorator]
def _tile(at, where, ok, BITS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE):  # type: ignore[no-untyped-def]
    """[TILE, BLOCK_D] keys or values, or their codes."""
    d = tl.arange(0, BLOCK_D)
    inside = ok[:, None] & (d < D)[None, :]
    if BITS == 4:
        half: tl.constexpr = D // 2
        byte = tl.load(at + where[:, None] * half + (d % half)[None, :], inside, other=0)
        return ((byte >> (d // half * 4).to(tl.uint8)[None, :]) & 15).to(DTYPE)
    else:
        return tl.load(at + where[:, None] * D + d[None, :], inside, other=0).to(DTYPE)


@triton.jit  # type: ignore[untyped-decorator]
def _span(place, window, OLD: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The positions low..high of this program, where its store begins, and all there are."""
    base, seen = tl.load(place + 2), tl.load(place + 3)
    begin, end = (base * 0, base) if OLD else (base, seen)
    first = tl.maximum(begin, seen - window)
    each = tl.cdiv(tl.cdiv(tl.maximum(end - first, 0), SPLIT), TILE) * TILE
    low = first + tl.program_id(1) * each
    return low, tl.minimum(low + each, end), begin, seen


@triton.jit  # type: ignore[untyped-decorator]
def _scores(  # type: ignore[no-untyped-def]
    query, k, grid, where, ok, scale, cap, BITS: tl.constexpr, HAS_CAP: tl.constexpr
):
    """[ROWS, TILE] of queries and keys or their codes."""
    s = tl.dot(query, tl.trans(k), input_precision="ieee")
    if BITS < 16:
        step = tl.load(grid + where * 2, ok, other=0).to(tl.float32)
        low = tl.load(grid + where * 2 + 1, ok, other=0).to(tl.float32)
        s = s * step[None, :] + tl.sum(query.to(tl.float32), 1)[:, None] * low[None, :]
    s = s * scale
    if HAS_CAP:
        s = cap * (2 * tl.sigmoid(2 * s / cap) - 1)  # tanh
    return s


@triton.jit  # type: ignore[untyped-decorator]
def _mix(p, v, grid, where, ok, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """[ROWS, BLOCK_D]: values, or their codes, weighted by `p`."""
    if BITS < 16:
        step = tl.load(grid + where * 2, ok, other=0).to(tl.float32)
        low = tl.load(grid + where * 2 + 1, ok, other=0).to(tl.float32)
        mixed = tl.dot((p * step[None, :]).to(v.dtype), v, input_precision="ieee")
        return mixed + tl.sum(p * low[None, :], 1)[:, None]
    else:
        return tl.dot(p.to(v.dtype), v, input_precision="ieee")


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    q,  # [rows, GROUP, D]
    keys,
    values,
    key_grid,
    value_grid,
    padding,  # int64 [batch], or anything if not HAS_PADDING
    place,  # int64: position, slot, base, seen
    sums,  # fp32 [rows, GROUP, parts, D]
    stats,  # fp32 [rows, GROUP, parts, 2]: the largest score, the mass
    capacity,
    kv_heads,
    prefix,
    window,
    scale,
    cap,
    first_part,
    parts,
    BITS: tl.constexpr,
    OLD: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_CAP: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    DTYPE: tl.constexpr = q.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    low, high, begin, seen = _span(place, window, OLD, SPLIT, TILE)
    g, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    rows, inside = row * GROUP + g, (g < GROUP)[:, None] & (d < D)[None, :]
    query = tl.load(q + rows[:, None] * D + d[None, :], inside, other=0)
    top = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    mass = tl.zeros((ROWS,), dtype=tl.float32)
    mixed = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    for at in range(low, high, TILE):
        n = at + tl.arange(0, TILE)
        ok = n < high
        where = row * capacity + n - begin
        k = _tile(keys, where, ok, BITS, D, BLOCK_D, DTYPE)
        s = _scores(query, k, key_grid, where, ok, scale, cap, BITS, HAS_CAP)
        if HAS_PADDING:  # a pad token sees itself: a row without keys would be NaN
            real = tl.load(padding + row // kv_heads) + prefix
            ok = ok & ((n >= real) | (n < prefix) | (n == seen - 1))
        s = tl.where(ok[None, :], s, float("-inf"))
        highest = tl.maximum(top, tl.max(s, 1))
        against = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp(s - against[:, None])
        fade = tl.exp(top - against)
        mass = mass * fade + tl.sum(p, 1)
        v = _tile(values, where, ok, BITS, D, BLOCK_D, DTYPE)
        mixed = mixed * fade[:, None] + _mix(p, v, value_grid, where, ok, BITS)
        top = highest
    part = rows * parts + first_part + tl.program_id(1)
    tl.store(sums + part[:, None] * D + d[None, :], mixed, inside)
    tl.store(stats + part * 2, top, g < GROUP)
    tl.store(stats + part * 2 + 1, mass, g < GROUP)


@triton.jit  # type: ignore[untyped-decorator]
def _combine(  # type: ignore[no-untyped-def]
    sums, stats, out, parts, D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr
):
    """out[row] = the parts of one query head, added under their common largest score."""
    row = tl.program_id(0).to(tl.int64)
    i, d = tl.arange(0, PARTS), tl.arange(0, BLOCK_D)
    at, ok = row * parts + i, i < parts
    top = tl.load(stats + at * 2, ok, other=float("-inf"))
    weight = tl.exp(top - tl.max(top, 0))
    mass = tl.sum(weight * tl.load(stats + at * 2 + 1, ok, other=0), 0)
    inside = ok[:, None] & (d < D)[None, :]
    mixed = tl.load(sums + at[:, None] * D + d[None, :], inside, other=0)
    tl.store(out + row * D + d, tl.sum(weight[:, None] * mixed, 0) / mass, d < D)


def attend(
    q: Tensor,
    stores: Sequence[Store],
    place: Tensor,
    rule: Rule,
    padding: Tensor | None,
    prefix: int,
) -> Tensor:
    """As `placed.reference`."""
    batch, heads, dim = q.shape
    rows = stores[0].keys.shape[0]
    group, block_d = heads * batch // rows, max(16, triton.next_power_of_2(dim))
    splits = [_split(store.keys.shape[1], rows, q.device) for store in stores]
    parts = sum(splits)
    sums = q.new_empty(rows, group, parts, dim, dtype=torch.float32)
    stats = q.new_empty(rows, group, parts, 2, dtype=torch.float32)
    out, q = torch.empty_like(q), q.contiguous()
    check_launch(q.device, (q, FLOATS, batch * heads * dim), (place, torch.int64, 4))
    if padding is not None:
        check_launch(q.device, (padding, torch.int64, batch))
    for store in stores:
        _check_store(store, rows, dim)
    for store, split, first in zip(stores, splits, _starts(splits), strict=True):
        _attend[(rows, split)](
            q,
            store.keys,
            store.values,
            q if store.key_grid is None else store.key_grid,
            q if store.value_grid is None else store.value_grid,
            place if padding is None else padding,
            place,
            sums,
            stats,
            store.keys.shape[1],
            rows // batch,
            prefix,
            rule.window or NO_WINDOW,
            rule.scale,
            rule.cap or 1.0,
            first,
            parts,
            BITS=store.bits,
            OLD=store.old,
            HAS_PADDING=padding is not None,
            HAS_CAP=rule.cap is not None,
            GROUP=group,
            D=dim,
            BLOCK_D=block_d,
            ROWS=max(ROWS, triton.next_power_of_2(group)),
            TILE=TILE,
            SPLIT=split,
        )
    _combine[(rows * group,)](
        sums, stats, out, parts, D=dim, BLOCK_D=block_d, PARTS=triton.next_power_of_2(parts)
    )
    return out


def _check_store(store: Store, rows: int, dim: int) -> None:
    count, dtypes = rows * store.keys.shape[1] * dim, FLOATS if store.bits == 16 else torch.uint8
    size = count * min(store.bits, 8) // 8
    device = store.keys.device
    check_launch(device, (store.keys, dtypes, size), (store.values, dtypes, size))
    for grid in (store.key_grid, store.value_grid):
        if grid is not None:
            check_launch(device, (grid, FLOATS, count // dim * 2))


def _starts(splits: list[int]) -> list[int]:
    return [sum(splits[:i]) for i in range(len(splits))]


def _split(capacity: int, rows: int, device: torch.device) -> int:
    """How many programs share a row's keys: two for each processor, no more than tiles."""
    wanted = triton.next_power_of_2(triton.cdiv(2 * processors(device), rows))
    tiles = -(-capacity // TILE)
    return max(1, min(int(wanted), MOST_PARTS, tiles))


@cache
def check() -> str:
    """Compares the kernel with torch on this machine's GPU. Raises NoKernel."""
    if not torch.cuda.is_available():
        raise NoKernel("no GPU")
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 4, 160, 80, generator=generator)
    q, place = torch.randn(2, 6, 80, generator=generator), torch.tensor([0, 130, 0, 131])
    given = [Store(16, keys, values)], place, Rule(0.1, window=100), torch.tensor([0, 60])
    wanted = reference(q, *given, 0)
    moved = [Store(16, keys.cuda(), values.cuda())], place.cuda(), given[2], given[3].cuda()
    error = float((attend(q.cuda(), *moved, 0).cpu() - wanted).norm() / wanted.norm())
    if not error < 1e-4:
        raise NoKernel(f"it disagrees with torch by {error:.1e}")
    return torch.cuda.get_device_name()
