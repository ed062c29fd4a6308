"""Attention in a block: projections, rotation, the cache, and which kernel runs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from optim.runtime.architecture.rope import rotate
from optim.runtime.cache import device_position
from optim.runtime.cache.attention import Rule, attend
from optim.runtime.cache.device_position import Place
from optim.runtime.cache.full import Layer
from optim.runtime.cache.quantized import PackedLayer
from optim.runtime.decoder.layers import HeadNorm
from optim.runtime.decoder.linears.base import Linear
from optim.runtime.kernels.cpu import attention_prompt
from optim.runtime.kernels.cpu import step as cpu_step


@dataclass(slots=True)
class Step:
    """What all blocks share in one forward: where it starts, the rotary angles, the padding.

    One token may have its `place` on the device; `start` means nothing then.
    """

    start: int
    angles: dict[str, tuple[Tensor, Tensor]]
    padding: Tensor | None
    prefix: int = 0
    place: Place | None = None


@dataclass(slots=True)
class Attention:
    """Self-attention with a fused `qkv` linear; `rope` None leaves positions out."""

    qkv: Linear
    out: Linear
    heads: int
    kv_heads: int
    head_dim: int
    interleaved: bool
    norm: HeadNorm | None
    rope: str | None
    rule: Rule
    one_token: cpu_step.Attend | None

    def __call__(self, x: Tensor, cache: Layer, step: Step) -> Tensor:
        y = self._project(x)
        in_c = step.place is None and not (step.prefix and step.padding is not None)
        seen = self._in_c(y, cache, step) if in_c and self.one_token is not None else None
        if seen is None:
            qk, v = y[:, :, : self.heads + self.kv_heads], y[:, :, self.heads + self.kv_heads :]
            if self.rope is not None:
                qk = rotate(qk, *step.angles[self.rope])
            q, k = qk[:, :, : self.heads], qk[:, :, self.heads :]
            seen = self._attend(q, k, v, cache, step)
        out: Tensor = self.out(seen)
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, cache: Layer, step: Step) -> Tensor:
        padding, prefix = step.padding, step.prefix
        if step.place is not None:
            device_position.write(cache, k, v, step.place)
            return _attend_placed(q, cache, step.place, self.rule, padding, prefix)
        cache.write(k, v, step.start)
        return attend(q, cache, step.start, self.rule, padding, prefix)

    def _in_c(self, y: Tensor, cache: Layer, step: Step) -> Tensor | None:
        """What `y` sees, through a C kernel if one reads this cache: `[B, T, heads * D]`."""
        angles = step.angles[self.rope] if self.rope else None
        if y.shape[1] > 1:
            if not attention_prompt.reads(cache):
                return None
            return attention_prompt.attend_prompt(
                y, cache, step.start, self.rule, angles, step.padding
            )
        if self.one_token is None or not cpu_step.reads(cache):
            return None
        return self.one_token(y[:, 0], cache, step.start, angles, step.padding)[:, None]

    def _project(self, x: Tensor) -> Tensor:
        """Normalized queries and keys, and values: `[B, T, heads + 2 kv_heads, D]`."""
        b, t, _ = x.shape
        y: Tensor = self.qkv(x)
        if self.interleaved:
            y = y.view(b, t, self.heads, 3, self.head_dim).transpose(2, 3)
        y = y.reshape(b, t, -1, self.head_dim)
        if self.norm is None:
            return y
        q, k, v = y.split_with_sizes([self.heads, self.kv_heads, self.kv_heads], 2)
        return torch.cat((*self.norm(q, k), v), 2)


def _attend_placed(
    q: Tensor, layer: Layer, place: Place, rule: Rule, padding: Tensor | None, prefix: int
) -> Tensor:
    """What `q` `[B, 1, heads, D]` sees in `layer`, which holds it already: `[B, 1, heads * D]`."""
    one, rotation = q[:, 0], None
    if isinstance(layer, PackedLayer):
        rotation = layer.rotation
        one = (one.float() @ rotation).to(q.dtype)
    out = _product(q.device)(
        one, device_position.stores(layer), place.numbers, rule, padding, prefix
    )
    if rotation is not None:
        out = (out.float() @ rotation).to(q.dtype)
    return out.flatten(1)[:, None]


def _product(device: torch.device) -> Callable[..., Tensor]:
    if device.type != "cuda":
        return device_position.reference
    from optim.runtime.kernels.triton import attention

    return attention.attend
