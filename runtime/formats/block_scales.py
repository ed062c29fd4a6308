"""Scales for GGUF's blocks: those with the least error for given weights, as the blocks hold them.

w ~ (q - zero) scale for the codes q of a group, or codebook(q) scale. `zero` is the middle code
where groups have no offset, else -offset / scale, which is no integer. Scales are never 0, so that
nothing divides by it: the least is that of fp16.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from optim.runtime.formats.blocks import BLOCKS, Array, Blocks, Opened, close_blocks

TINY, HUGE = 2.0**-24, 65504.0  # of fp16
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.72)  # of a group's range
REFITS = 2


@dataclass(frozen=True, slots=True)
class Scales:
    """scale, zero float32 `[rows, groups]`; heads `[rows, blocks, 1 or 2]`: d, dmin of a K type."""

    scale: Tensor
    zero: Tensor
    heads: Tensor | None


def cover(low: Tensor, high: Tensor, kind: Blocks) -> Scales:
    """The scales that cover low <= 0 <= high `[rows, groups]`, as plain rounding takes them."""
    first, last = kind.ends
    if kind.offset:
        return settle((high - low) / last, low, kind)
    return settle(torch.where(high > -low, high, low) / first, None, kind)


def fit(w: Tensor, kind: Blocks, grams: Tensor | None = None) -> Scales:
    """The scales of weights `[rows, in]` with the least e H e of their plain rounding errors e.

    H of a group is its block of `grams` `[groups, group, group]`, or 1. Its range is shrunk step by
    step; each time the codes that this gives get their least-squares scale, and offset.
    """
    groups = w.view(len(w), -1, kind.group).transpose(0, 1).contiguous()
    best = _Best(groups, kind, grams)
    low, high = (end.unsqueeze(-1) for end in groups.aminmax(dim=-1))
    low, high = low.clamp(max=0), high.clamp(min=0)
    first, last = kind.ends
    far = torch.where(high > -low, high, low)
    for shrink in SHRINKS:
        if kind.offset:
            best.consider(_half((high - low) * (shrink / last)), low * shrink)
        else:
            best.consider(_half(far * (shrink / first)))
            best.consider(_half(far * (shrink / last)))
    for _ in range(REFITS):
        best.consider(best.scale, best.offset)
    scale, offset = best.scale.squeeze(-1).T, best.offset.squeeze(-1).T
    return settle(scale, offset if kind.offset else None, kind)


class _Best:
    """The best scale and offset so far of each group `[groups, rows, 1]`."""

    def __init__(self, w: Tensor, kind: Blocks, grams: Tensor | None) -> None:
        self.w, self.kind, self.grams = w, kind, grams
        self.hw = w if grams is None else w @ grams
        ones = torch.ones_like(w[:, :1])
        self.h1 = ones if grams is None else ones @ grams
        self.gain: Tensor | None = None

    def consider(self, scale: Tensor, offset: Tensor | float = 0.0) -> None:
        """Take the codes of these, and keep their least-squares scale where it is better."""
        kind = self.kind
        q = codes_of(self.w, scale, kind.middle - offset / scale, kind)
        u = steps_of(q, kind.middle, kind)
        hu = u if self.grams is None else u @ self.grams
        wu, uu = (u * self.hw).sum(-1, True), (u * hu).sum(-1, True).clamp(min=1e-30)
        found, shift = wu / uu, torch.zeros_like(wu)
        gain = wu * found
        if kind.offset:
            u1, w1 = (u * self.h1).sum(-1, True), self.hw.sum(-1, True)
            ones = self.h1.sum(-1, True)
            det = uu * ones - u1 * u1
            steep, level = (wu * ones - w1 * u1) / det, (uu * w1 - u1 * wu) / det
            fits = (det > 1e-6 * uu * ones) & (steep > 0)
            if kind.nested:
                fits &= level <= 0
            found, shift = torch.where(fits, steep, found), torch.where(fits, level, shift)
            gain = torch.where(fits, steep * wu + level * w1, gain)
        if self.gain is None:
            self.scale, self.offset = scale, shift * 0 + offset
            self.gain = torch.full_like(gain, -torch.inf)
        better = (gain > self.gain) & found.isfinite() & (found != 0)
        self.gain = torch.where(better, gain, self.gain)
        self.scale = torch.where(better, found, self.scale)
        self.offset = torch.where(better, shift, self.offset)


def settle(scale: Tensor, offset: Tensor | None, kind: Blocks) -> Scales:
    """Scales and offsets `[rows, groups]` as the blocks can hold them."""
    if not kind.nested:
        scale, middle = _half(scale), torch.full_like(scale, kind.middle)
        return Scales(scale, middle if offset is None else -_half(offset, 0.0) / scale, None)
    d, s = _nested(scale, kind, kind.least)
    s = torch.where(s == 0, 1, s)
    scale = (d[..., None] * s).flatten(1)
    if offset is None:
        return Scales(scale, torch.full_like(scale, kind.middle), d[..., None])
    dmin, k = _nested(-offset.clamp(max=0), kind, 0)
    return Scales(scale, (dmin[..., None] * k).flatten(1) / scale, torch.stack((d, dmin), -1))


def codes_of(w: Tensor, scale: Tensor, zero: Tensor | float, kind: Blocks) -> Tensor:
    """The nearest codes, float32 in the shape of w; scale and zero spread over it."""
    book = kind.codebook
    if book is None:
        return (w / scale).add_(zero).round_().clamp_(0, (1 << kind.bits) - 1)
    return torch.bucketize(w / scale, (book[1:] + book[:-1]) / 2).float()


def steps_of(q: Tensor, zero: Tensor | float, kind: Blocks) -> Tensor:
    """What codes stand for, in steps of their scales."""
    book = kind.codebook
    return q - zero if book is None else book[q.long()]


def packed_rows(q: Tensor, scales: Scales, kind: Blocks) -> Array:
    """Codes uint8 `[rows, in]` on settled scales, in blocks: uint8 `[rows, bytes of a row]`."""
    rows = len(q)
    offset = -scales.zero * scales.scale
    if scales.heads is None:
        m = offset.half().numpy() if kind.offset else None
        return close_blocks(Opened(q.numpy(), scales.scale.half().numpy(), m, None, None), kind)
    d, dmin = scales.heads[..., :1], scales.heads[..., -1:]

    def steps(values: Tensor, head: Tensor) -> Array:
        whole = (values.view(*head.shape[:2], -1) / head).round().to(torch.int16)
        return whole.view(rows, -1).numpy()

    halves = (x.squeeze(-1).half().numpy() for x in (d, dmin))
    s, k = steps(scales.scale, d), steps(-offset, dmin) if kind.offset else None
    head, low = halves
    return close_blocks(Opened(q.numpy(), head, low if kind.offset else None, s, k), kind)


def rounded_rows(w: Tensor, name: str) -> Array:
    """Weights `[rows, in]`, rounded with the scales that `fit` them best, in blocks."""
    kind = BLOCKS[name]
    w = w.float()
    scales = fit(w, kind)
    groups = w.view(len(w), -1, kind.group)
    q = codes_of(groups, scales.scale[..., None], scales.zero[..., None], kind)
    return packed_rows(q.flatten(1).to(torch.uint8), scales, kind)


def _half(values: Tensor, floor: float = TINY) -> Tensor:
    """Rounded to fp16, no nearer to 0 than `floor`."""
    held = values.clamp(-HUGE, HUGE).half().float()
    return torch.where(held.abs() < floor, floor, held)


def _nested(values: Tensor, kind: Blocks, least: int) -> tuple[Tensor, Tensor]:
    """d `[rows, blocks]` in fp16 and integers `[rows, blocks, groups]`: values ~ d times these."""
    blocks = values.reshape(len(values), -1, kind.size // kind.group)
    low, high = blocks.aminmax(dim=-1)
    d = _half(torch.where(high >= -low, high / kind.most, low / (least or -kind.most)))
    return d, (blocks / d[..., None]).round().clamp(least, kind.most)
