"""A gated feed-forward block with its activation made swappable, and watched.

    x1 = a(gate x) * (up x),  y = down x1,   a = s * FATReLU_t + (1 - s) * (the model's own)

FATReLU_t(g) is g where g >= t and g > 0, else 0 (ProSparse, arXiv 2402.13516, section 3.3): plain
ReLU for t = 0. s goes from 0 to 1 while the activation is swapped.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from optim.prune.prosparse.losses import mean_abs
from optim.recipes.errors import USAGE, OptimError
from optim.runtime.architecture.activations import fatrelu

ACTIVATIONS = "act_fn", "activation_fn"  # what transformers calls it in gated blocks


class Swapped(nn.Module):
    """`share` of FATReLU, the rest of the model's own activation."""

    def __init__(self, own: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.own, self.share, self.threshold = own, 1.0, 0.0

    def forward(self, x: Tensor) -> Tensor:
        if self.share >= 1:
            return fatrelu(x, self.threshold)
        return torch.lerp(self.own(x), fatrelu(x, self.threshold), self.share)


def feed_forwards(blocks: nn.ModuleList, name: str) -> list[nn.Module]:
    """The gated feed-forward of each block.

    Raises OptimError (2) where a block has none or several (a mixture of experts).
    """
    found = []
    for i, block in enumerate(blocks):
        inside = [m for m in block.modules() if _is_gated(m)]
        if len(inside) != 1:
            raise OptimError(
                f"{name}: block {i} has {len(inside) or 'no'} gated feed-forwards "
                "(gate, up, down); prosparse wants one in each",
                "models that are ReLU already need no training: -m relu-exact",
                USAGE,
            )
        found += inside
    return found


def _is_gated(module: nn.Module) -> bool:
    children = dict(module.named_children())
    gated = "gate_up_proj" in children or {"gate_proj", "up_proj"} <= children.keys()
    down = isinstance(children.get("down_proj"), nn.Linear)
    return gated and down and any(hasattr(module, name) for name in ACTIVATIONS)


def activation_keys(config: Any) -> list[str]:
    """How the family's configuration calls the activation (gemma: by two names)."""
    return [key for key in ("hidden_activation", "hidden_act") if hasattr(config, key)]


def swap(ffns: list[nn.Module]) -> list[Swapped]:
    """Replace each block's activation in place by a `Swapped` one."""
    swapped = []
    for ffn in ffns:
        name = next(name for name in ACTIVATIONS if hasattr(ffn, name))
        made = Swapped(getattr(ffn, name))
        setattr(ffn, name, made)
        swapped.append(made)
    return swapped


@dataclass(slots=True)
class Seen:
    """What one forward pass showed, a value a block: its output, mean |x1|, share of zeros."""

    outputs: list[Tensor] = field(default_factory=list)
    sizes: list[Tensor] = field(default_factory=list)
    zeros: list[Tensor] = field(default_factory=list)


@contextmanager
def watched(blocks: nn.ModuleList, ffns: list[nn.Module]) -> Iterator[Seen]:
    """Record block outputs and x1's size and zeros of the pass that runs inside.

    x1 itself is not kept: its mean is taken where it is made, so that activation checkpointing
    still frees it.
    """
    seen = Seen()

    def look(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.sizes.append(mean_abs(inputs[0]))
        seen.zeros.append((inputs[0].detach() == 0).float().mean())

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in blocks]
    handles += [f.get_submodule("down_proj").register_forward_pre_hook(look) for f in ffns]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def recompute(blocks: nn.ModuleList) -> None:
    """Keep only each block's input for the backward pass, and compute its inside again."""
    for block in blocks:
        own = block.forward

        def forward(*args: Any, own: Callable[..., Any] = own, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return own(*args, **kwargs)
            return checkpoint(own, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        block.forward = forward
