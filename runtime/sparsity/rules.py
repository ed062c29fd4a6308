"""What a sparse block computes: the one definition, in torch, that kernels and solvers agree with.

Rules are hooks on the linears of a loaded block, for the positions from `start` on; before it the
block is dense, as a prompt is. With h = act(gate(x)) * up(x), the input of `down`:

    threshold   an input x_k of a linear with |x_k| <= t counts as zero           (TEAL, 2408.14690)
    gate        act(gate)_j with |act(gate)_j| <= t counts as zero       (CATS 2404.08763; FATReLU)
    core        the neurons with the largest scores over the prompt stay, the others are
                replaced by their mean on calibration text              (CoreInfer, 2410.18311)
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from optim.runtime.architecture.table import FAMILIES, Decoder
from optim.runtime.sparsity.core_neurons import Guide, chosen, scores
from optim.runtime.sparsity.side_file import BlockSide, Core, Side, linears_of
from optim.runtime.walk.walk import Walk

CHUNK = 8  # tokens that speculative decoding would verify at once


@dataclass(slots=True)
class Skips:
    """How much of each site's inputs was skipped: `token` on average, `chunk` by 8 in a row."""

    token: dict[str, float] = field(default_factory=dict)
    chunk: dict[str, float] = field(default_factory=dict)
    hooks: list[RemovableHandle] = field(default_factory=list)
    """What made the block sparse; `remove` takes it off."""
    _counts: dict[str, list[float]] = field(default_factory=dict)
    _length: int = 0

    def look(self, _block: nn.Module, args: tuple[Any, ...]) -> None:
        """Note how long the windows are that the block is given: `[b, t, hidden]`."""
        self._length = args[0].shape[1]

    def windows(self, x: Tensor) -> Tensor:
        """`x` `[b, t, n]`; some families flatten it to `[b t, n]`."""
        return x.reshape(-1, self._length, x.shape[-1])

    def remove(self) -> None:
        """Make the block dense again."""
        while self.hooks:
            self.hooks.pop().remove()

    def add(self, site: str, zero: Tensor) -> None:
        """`zero` bool `[b, t, n]`: what was skipped at t positions."""
        whole = zero.shape[1] // CHUNK * CHUNK
        eight = zero[:, :whole].reshape(len(zero), -1, CHUNK, zero.shape[2]).all(2)
        counts = self._counts.setdefault(site, [0, 0, 0, 0])
        for i, part in enumerate((zero, eight)):
            counts[2 * i] += float(part.sum())
            counts[2 * i + 1] += part.numel()
        self.token[site] = counts[0] / max(counts[1], 1)
        self.chunk[site] = counts[2] / max(counts[3], 1)

    def as_dict(self) -> dict[str, Any]:
        """A plain dictionary."""
        return {"token": self.token, "chunk": self.chunk}


class SparseWalk:
    """The blocks of a walk with their rules on, and what each skipped as it ran."""

    def __init__(self, walk: Walk, side: Side, start: int) -> None:
        self.walk, self.side, self.start = walk, side, start
        self.facts = FAMILIES[walk.model.config.get_text_config().model_type].decoder
        self.guide = Guide(side, [])
        self.skips: list[Skips] = []

    def block(self, i: int) -> nn.Module:
        """Block i, loaded, sparse from `start` on; blocks are to be asked for in order."""
        block = self.walk.block(i)
        rules = self.side.blocks[i]
        self.skips.append(sparsify(block, self.facts, rules, self.guide, self.start))
        return block


def sparsify(
    block: nn.Module,
    facts: Decoder,
    rules: BlockSide,
    guide: Guide,
    start: int,
) -> Skips:
    """Put the `rules` on a loaded block; returns what will be counted as it runs.

    `guide` is shared by a model's blocks, which must see the same prompts in the same order.
    """
    skips = Skips()
    hooks = skips.hooks
    hooks.append(block.register_forward_pre_hook(skips.look))
    for site, names in linears_of(facts).items():
        if site in rules.thresholds:
            hook = _below(rules.thresholds[site], site, skips, start)
            for k, name in enumerate(names):
                each = hook if k == 0 else _quiet(hook)
                hooks.append(block.get_submodule(name).register_forward_pre_hook(each))
    down = block.get_submodule(facts.down)
    if rules.gate is not None and facts.gated:
        act = activation(block, facts)
        gate = block.get_submodule(facts.up[0])
        hooks.append(gate.register_forward_hook(_gated(rules.gate, act, start)))
        hooks.append(down.register_forward_pre_hook(_count_zeros(skips, start)))
    elif rules.gate is not None:
        hooks.append(down.register_forward_pre_hook(_below(rules.gate, "down", skips, start)))
    if rules.core is not None:
        hooks.append(down.register_forward_pre_hook(_core(rules.core, guide, skips, start)))
    return skips


def activation(block: nn.Module, facts: Decoder) -> Callable[[Tensor], Tensor]:
    """The activation of a loaded block's feed-forward."""
    stem = facts.up[0].rpartition(".")[0]
    owner = block.get_submodule(stem) if stem else block
    names = ("act_fn", "activation_fn", "act", "activation")
    act: Callable[[Tensor], Tensor] = next(getattr(owner, n) for n in names if hasattr(owner, n))
    return act


def _below(t: float, site: str, skips: Skips, start: int) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Tensor], *, count: bool = True) -> tuple[Tensor]:
        x = skips.windows(args[0]).clone()
        zero = x[:, start:].abs() <= t
        x[:, start:][zero] = 0
        if count:
            skips.add(site, zero)
        return (x.view(args[0].shape),)

    return hook


def _quiet(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The same rule for a further linear of the site, not counted again."""
    return lambda module, args: hook(module, args, count=False)


def _gated(t: float, act: Callable[[Tensor], Tensor], start: int) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, gate: Tensor) -> Tensor:
        tail = gate[:, start:]
        return torch.cat((gate[:, :start], torch.where(act(tail).abs() <= t, 0, tail)), 1)

    return hook


def _count_zeros(skips: Skips, start: int) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Tensor]) -> None:
        zero = skips.windows(args[0])[:, start:] == 0
        skips.add("down", zero)
        skips.add("rows", zero)

    return hook


def _core(core: Core, guide: Guide, skips: Skips, start: int) -> Callable[..., Any]:
    seen = 0

    def hook(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        nonlocal seen
        h = skips.windows(args[0]).clone()
        for row in h:
            prompt = scores(row[:start], core.norm, guide.side.options)
            if seen == len(guide.clusters):
                guide.assign(prompt)
            away = torch.ones(row.shape[1], dtype=torch.bool, device=row.device)
            away[chosen(guide.total(prompt, core, seen), core.keep)] = False
            row[start:, away] = 0 if core.mean is None else core.mean.to(row)[away]
            skips.add("core", away.expand(1, len(row) - start, -1))
            seen += 1
        return (h.view(args[0].shape),)

    return hook
