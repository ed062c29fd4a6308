"""Attention of T new queries over a cache: causal, windowed, soft-capped, left-padded.

softmax(cap(q k^T * scale) + mask) v, with softmax in fp32. Grouped query heads (GQA, arXiv
2305.13245) are folded into rows: the group shares its keys, so one product serves it all. Rows go
in blocks, each against only the keys it may see; that bounds the scratch and skips the triangle.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from optim.runtime.cache.full import Layer, LayerCache

ROWS = 128  # query positions a block


@dataclass(frozen=True, slots=True)
class Rule:
    """How a layer attends: `scale` of the scores, `window` in positions, soft `cap`."""

    scale: float
    window: int | None = None
    cap: float | None = None


def attend(
    q: Tensor, cache: Layer, start: int, rule: Rule, padding: Tensor | None, prefix: int = 0
) -> Tensor:
    """What `q` `[B, T, heads, D]` at start..start+T see in `cache`: `[B, T, heads * D]`.

    The keys and values of those positions are in the cache already. `padding` follows `prefix`
    positions, which every row sees.
    """
    if isinstance(cache, LayerCache) and cache.keys.dim() == 4 and rule.cap is None:
        return _fused(q, cache, start, rule, padding, prefix)
    blocks = [
        _rows(block, cache, start + i * ROWS, rule, padding, prefix)
        for i, block in enumerate(torch.split(q, ROWS, 1))
    ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)


def _rows(
    q: Tensor, cache: Layer, start: int, rule: Rule, padding: Tensor | None, prefix: int
) -> Tensor:
    b, t, heads, d = q.shape
    kv = cache.rows // b
    group, end = heads // kv, start + t
    first = max(0, start - rule.window + 1) if rule.window else 0
    rows = q.view(b, t, kv, group, d).permute(0, 2, 3, 1, 4).reshape(b * kv, group * t, d)
    scores = cache.scores(rows, first, end, rule.scale)
    if rule.cap is not None:
        scores = torch.tanh(scores / rule.cap) * rule.cap
    mask = visible(start, t, first, rule.window, padding, q.device, prefix)
    if mask is not None:
        hidden = ~mask[:, None, None]
        scores.view(b, kv, group, t, -1).masked_fill_(hidden, torch.finfo(scores.dtype).min)
    out = cache.mix(torch.softmax(scores, -1), first, end)
    out = out.view(b, kv, group, t, d).permute(0, 3, 1, 2, 4)
    return out.reshape(b, t, heads * d).to(q.dtype)


def visible(
    start: int,
    t: int,
    first: int,
    window: int | None,
    padding: Tensor | None,
    device: torch.device,
    prefix: int = 0,
) -> Tensor | None:
    """Bool `[B or 1, t, n]`: which of the keys first..start+t each of t queries sees; None: all."""
    if t == 1 and padding is None:
        return None  # the caller has cut the keys to the window already
    keys = torch.arange(first, start + t, device=device)
    queries = torch.arange(start, start + t, device=device)[:, None]
    mask = keys <= queries
    if window is not None:
        mask &= keys > queries - window
    if padding is None:
        return mask[None]
    # A pad token sees itself: a row without keys would be NaN.
    real = (keys >= padding[:, None, None] + prefix) | (keys < prefix)
    return (mask & real) | (keys == queries)


def _fused(
    q: Tensor, cache: LayerCache, start: int, rule: Rule, padding: Tensor | None, prefix: int
) -> Tensor:
    b, t, heads, d = q.shape
    end = start + t
    first = max(0, start - rule.window + 1) if rule.window else 0
    keys, values = cache.keys[:, :, first:end], cache.values[:, :, first:end]
    mask = visible(start, t, first, rule.window, padding, q.device, prefix)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2).to(keys.dtype),
        keys,
        values,
        attn_mask=None if mask is None else mask[:, None],
        scale=rule.scale,
        enable_gqa=True,
    )
    return out.transpose(1, 2).reshape(b, t, heads * d).to(q.dtype)
