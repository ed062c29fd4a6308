"""The pieces of a block beside attention: norms, activations, feed-forward, mixtures."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optim.runtime.architecture.activations import fatrelu
from optim.runtime.decoder.linears.base import Linear
from optim.runtime.decoder.linears.static_int import StepNorm
from optim.runtime.kernels.cpu import step as cpu_step


class FatRelu(nn.Module):
    """`fatrelu` with a threshold, as a module of transformers' blocks."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        return fatrelu(x, self.threshold)


def raise_threshold(model: nn.Module, threshold: float) -> None:
    """Give transformers' ReLU blocks the threshold that `hidden_act_param` asks for, in place."""
    for module in model.modules() if threshold > 0 else ():
        for name in ("act_fn", "activation_fn"):
            if isinstance(getattr(module, name, None), nn.ReLU):
                setattr(module, name, FatRelu(threshold))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467), in fp32.

    On a CPU torch has no fused kernel. Ours is C; without a compiler, LayerNorm over [x, -x],
    whose mean is zero and whose variance is mean(x^2), gives the same in half the time.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32:
        if cpu_step.usable():
            return cpu_step.rms_norm(x.contiguous(), weight, eps)
        n = x.shape[-1]
        return F.layer_norm(torch.cat((x, -x), -1), (2 * n,), eps=eps)[..., :n] * weight
    return (F.rms_norm(x.float(), x.shape[-1:], eps=eps) * weight).to(x.dtype)


@dataclass(slots=True)
class RMSNorm:
    """`weight` `[n]` fp32; families that store w - 1 have the 1 added at load."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


@dataclass(slots=True)
class LayerNorm:
    """`weight`, `bias` `[n]`, either may be absent."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        shape = x.shape[-1:]
        return F.layer_norm(x.float(), shape, self.weight, self.bias, self.eps).to(x.dtype)


Norm = RMSNorm | LayerNorm | StepNorm


@dataclass(slots=True)
class HeadNorm:
    """Norms of queries and keys: per head, or (`full`) over the whole projection."""

    query: Tensor
    key: Tensor
    eps: float
    full: bool

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """`q`, `k` `[B, T, heads, D]`."""
        return self._one(q, self.query), self._one(k, self.key)

    def _one(self, x: Tensor, weight: Tensor) -> Tensor:
        flat = x.flatten(2) if self.full else x
        return rms_norm(flat, weight, self.eps).view(x.shape)


class FeedForward(Protocol):
    """What a block has beside attention: x `[B, T, hidden]` -> the same shape."""

    @property
    def running(self) -> "MLP | None":
        """The plain feed-forward that a call computes; None: it is of another kind."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of weights that a decoded token reads, if it leaves nothing out."""
        ...

    @property
    def skipped_bytes(self) -> float:
        """Of those, how many were left out on average over the tokens decoded so far."""
        ...

    @property
    def recordable(self) -> bool:
        """Whether a recorded step may hold it: the host decides and counts nothing in a call."""
        ...

    def __call__(self, x: Tensor) -> Tensor: ...


@dataclass(slots=True)
class MLP:
    """down(act(gate(x)) * up(x)), gate and up in one linear; down(act(up(x))) where not `gated`."""

    up: Linear
    down: Linear
    act: Callable[[Tensor], Tensor]
    gated: bool

    @property
    def running(self) -> "MLP":
        return self

    @property
    def nbytes(self) -> int:
        return self.up.nbytes + self.down.nbytes

    @property
    def skipped_bytes(self) -> float:
        return self.up.skipped_bytes + self.down.skipped_bytes

    @property
    def recordable(self) -> bool:
        return self.up.recordable and self.down.recordable

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.inner(x))
        return y

    def inner(self, x: Tensor) -> Tensor:
        """What `down` reads: the activations of the neurons."""
        h: Tensor = self.up(x)
        return _gate(h, self.act) if self.gated else self.act(h)


def _gate(h: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    plain = h.device.type == "cpu" and h.dtype == torch.float32 and h.is_contiguous()
    if plain and act is F.silu and cpu_step.usable():
        return cpu_step.swiglu(h)
    gate, up = h.chunk(2, -1)
    return act(gate).mul_(up)


@dataclass(slots=True)
class Mixture:
    """Each token goes through its `top` experts, weighted by the router's softmax.

    `normalize`: the kept weights are made to sum to one.
    """

    router: Linear
    experts: list[MLP]
    top: int
    normalize: bool
    running: None = None
    skipped_bytes: float = 0.0
    recordable: bool = False  # the host picks the experts

    @property
    def nbytes(self) -> int:
        held = sum(expert.nbytes for expert in self.experts)
        return self.router.nbytes + held * self.top // len(self.experts)

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        chances = torch.softmax(self.router(flat).float(), -1)
        weights, chosen = chances.topk(self.top, -1)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for expert in torch.unique(chosen).tolist():
            tokens, slot = (chosen == expert).nonzero(as_tuple=True)
            y = self.experts[expert](flat[tokens]) * weights[tokens, slot, None].to(x.dtype)
            out.index_add_(0, tokens, y)
        return out.view(x.shape)
