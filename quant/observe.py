"""What the linears of a block read on the calibration text, as one Gram matrix an input.

H = XᵀX / n stands for every token in the searches that follow: their cost does not grow with text.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.system.team import ALONE, Team
from optim.runtime.walk.walk import HiddenStates, Walk, linear_at, linears, tokens_read

GRAM_BYTES = 2**30  # of experts' inner inputs that are observed at a time
GRAM_STRIP = 288  # columns a strip of a symmetric Gram matrix has


@dataclass(slots=True)
class Inputs:
    """What a linear reads: grams XᵀX / n `[in, in]`, mean |x| `[in]`, tokens seen.

    There is one gram; guided, one for each group of the linear's rows, of weighted tokens. `shares`
    are the sums of those weights and of their squares, `[2, groups]`.
    """

    grams: list[Tensor]
    magnitude: Tensor
    tokens: int
    shares: Tensor

    @classmethod
    def nothing(cls, width: int, groups: int, device: torch.device) -> "Inputs":
        """No token seen yet."""
        zeros = torch.zeros(width, device=device)
        grams = [zeros.new_zeros(width, width) for _ in range(groups)]
        return cls(grams, zeros, 0, zeros.new_zeros(2, groups))

    def scarcity(self) -> list[float]:
        """Inputs over effective tokens (Kish: (Σ w)² / Σ w²), of each gram."""
        effective = self.shares[0].square() / self.shares[1].clamp(min=1e-30)
        return (len(self.magnitude) / effective.clamp(min=1)).tolist()


class _AllSeen(Exception):
    """Raised before the block's last linear: what it computes is not needed."""


def observe(
    walk: Walk,
    i: int,
    block: nn.Module,
    states: HiddenStates,
    names: set[str],
    last: str | None,
    weights: Mapping[str, Tensor] | None = None,
    windows: int | None = None,
    team: Team = ALONE,
) -> dict[str, Inputs]:
    """Run the calibration states through the block; the inputs of the linears in `names`.

    `last` is the linear that runs last, if that is known: the block is left when it is reached.
    `weights` `[tokens, groups]` of each linear weigh the tokens of its grams; without them all
    count alike. Only the first `windows` are run, or all. What the processes of a `team` see is
    summed up.
    """
    found: dict[str, Inputs] = {}
    tokens = slice(0, 0)

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2).float()
            read = tokens_read(block, name) if weights else None
            shares = None if weights is None else weights[name][tokens].to(x)
            _add(found, name, x, shares if shares is None or read is None else shares[read])

        return hook

    def leave(_module: nn.Module, _args: tuple[Tensor, ...]) -> None:
        raise _AllSeen

    handles = [block.get_submodule(n).register_forward_pre_hook(watch(n)) for n in names]
    if last is not None:
        handles.append(block.get_submodule(last).register_forward_pre_hook(leave))
    try:
        for rows in walk.slices(states):
            rows = slice(rows.start, min(rows.stop, len(states) if windows is None else windows))
            tokens = slice(rows.start * states.length, rows.stop * states.length)
            if rows.start < rows.stop:
                with suppress(_AllSeen):
                    walk.run(i, block, states[rows])
    finally:
        for handle in handles:
            handle.remove()
    if team.size > 1:
        found = _summed(found, block, names, weights, team)
    for name, seen in found.items():
        for gram in seen.grams:
            mirror(gram)
            gram /= seen.tokens
        seen.magnitude /= seen.tokens
        if not all(bool(g.diagonal().isfinite().all()) for g in seen.grams):  # it bounds the rest
            raise OptimError(
                f"block {i}: the inputs of {name} are not finite on the calibration text",
                fix="check the model's weights; a 16-bit overflow would show in its own output too",
                code=USAGE,
            )
    return found


def _add(found: dict[str, Inputs], name: str, x: Tensor, shares: Tensor | None) -> None:
    """Tokens x `[n, in]` to what was seen of a linear, weighed by `shares` `[n, groups]`."""
    if shares is None:
        shares = x.new_ones(len(x), 1)
        weighted = [x]
    else:
        weighted = [x * column[:, None].sqrt() for column in shares.T]
    if name not in found:
        found[name] = Inputs.nothing(x.shape[1], len(weighted), x.device)
    seen = found[name]
    for gram, rows in zip(seen.grams, weighted, strict=True):
        add_gram(gram, rows)
    seen.magnitude += x.abs().sum(0)
    seen.tokens += len(x)
    seen.shares += torch.stack((shares.sum(0), shares.square().sum(0)))


def _summed(
    found: dict[str, Inputs],
    block: nn.Module,
    names: set[str],
    weights: Mapping[str, Tensor] | None,
    team: Team,
) -> dict[str, Inputs]:
    """What all processes have seen; an expert may have been read on some of them only."""
    tokens = team.gather({name: seen.tokens for name, seen in found.items()})
    out = {}
    for name in sorted(names):
        if total := sum(part.get(name, 0) for part in tokens):
            linear, groups = linear_at(block, name), weights[name].shape[1] if weights else 1
            seen = found.get(name) or Inputs.nothing(
                linear.in_features, groups, linear.weight.device
            )
            team.add([*seen.grams, seen.magnitude, seen.shares])
            out[name] = replace(seen, tokens=total)
    return out


def add_gram(gram: Tensor, x: Tensor) -> None:
    """gram += XᵀX, the upper blocks only; `mirror` fills in the others at the end."""
    width = gram.shape[0]
    for start in range(0, width, GRAM_STRIP):
        strip = slice(start, start + GRAM_STRIP)
        gram[strip, start:].addmm_(x[:, strip].T, x[:, start:])


def mirror(gram: Tensor) -> None:
    """Make a Gram matrix of `add_gram` whole."""
    for start in range(0, gram.shape[0], GRAM_STRIP):
        end = start + GRAM_STRIP
        gram[end:, start:end] = gram[start:end, end:].T


def leaders_of(block: nn.Module, run: Callable[[], Tensor]) -> tuple[dict[str, str], Tensor]:
    """For each linear that ran, the first one that read the very same tensor; and the output."""
    first: dict[int, str] = {}
    leaders: dict[str, str] = {}
    kept: list[Tensor] = []  # alive, so that identities stay unique

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            kept.append(args[0])
            leaders[name] = first.setdefault(id(args[0]), name)

        return hook

    handles = [m.register_forward_pre_hook(watch(n)) for n, m in linears(block).items()]
    try:
        return leaders, run()
    finally:
        for handle in handles:
            handle.remove()
