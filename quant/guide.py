"""Guide a solver by the end loss: the tokens that it feels most count most (arXiv 2505.07004).

To second order the loss changes by ½ Σ_t (g_tᵀ Δh_t)² where the output h_t of a block moves by Δh_t
and g_t is the loss's gradient there. For row i of a linear that is ½ Σ_t g_ti² (Δw_i x_t)², so the
row wants Σ_t g_ti² x_t x_tᵀ instead of Σ_t x_t x_tᵀ. Groups of rows share their mean square.

The gradients are those of the unquantized model, found once by the reverse walk. Where few tokens
carry nearly all the weight, a Gram matrix of them would be fitted to these alone: weights are then
raised to a power below 1. In one block of sixteen both ways are solved without some windows and
compared on these; the blocks up to the next such check are solved guided, unless that has clearly
been worse so far, on all windows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optim.quant.solver import Task
from optim.runtime.storage.workspace import KEPT
from optim.runtime.system.team import ALONE, Team
from optim.runtime.walk.reverse import OUTPUT, ReverseWalk
from optim.runtime.walk.walk import HiddenStates, StoredLinear, Walk, linears

HELD_BACK, MOST_HELD_BACK = 8, 8  # one window of so many is held back, and no more than these
CHECKED = 16  # both ways are compared in one block of so many, the first of them
STRETCH = 64  # tokens: what two ways cost is compared stretch by stretch
CLEAR = 2.0  # standard errors
POWERS = (1.0, 0.5, 0.25, 0.0)
Costs = dict[str, float]
"""guided, unguided: what each costs the end loss on held-back windows, plain rounding being 1;
error: the standard error of the logarithm of guided over unguided, from pairs of stretches."""


@dataclass(slots=True)
class Guide:
    """What the reverse walk found, block by block; a check solves on the first `fitted` windows.

    Of a team each process has walked over its own windows, and `fitted` are of these.
    """

    found: ReverseWalk
    fitted: int
    checks: dict[int, Costs]
    checking: bool = True
    team: Team = ALONE

    @classmethod
    def of(cls, task: Task, groups: int) -> "Guide":
        """Walk the model backwards, or go on with it, or read what an earlier run has left."""
        assert task.windows is not None
        count, team = len(task.windows), task.team
        held, own = held_back(count), team.part(count)
        windows = task.windows[own]
        fitted = min(max(0, count - held - own.start), len(windows))
        folder, kept = task.folder / (KEPT + team.ending), len(windows) - fitted
        found = ReverseWalk(task.checkpoint, windows, folder, groups, kept, task.walk.device)
        found.run(task.progress)
        checks = {i: done["held_back"] for i, done in enumerate(task.done) if "held_back" in done}
        return cls(found, fitted, checks, held > 0, team)

    def checks_at(self, i: int) -> bool:
        """Whether both ways are to be compared in block i."""
        return self.checking and i % CHECKED == 0

    @property
    def pays(self) -> bool:
        """Whether guiding has not been clearly worse so far, by the mean of the checks."""
        worse = sum(math.log(c["guided"] / c["unguided"]) for c in self.checks.values())
        return worse <= CLEAR * math.hypot(*(c["error"] for c in self.checks.values()))

    def block(self, i: int, block: nn.Module) -> "BlockGuide":
        """Weights of the tokens at each linear of block i, and the gradient at its output."""
        squares = self.found.block(i)
        output = squares.pop(OUTPUT, torch.empty(0))
        squares, own = self._together(squares)
        mean = torch.stack([s.nanmean() for s in squares.values()]).nanmean()
        weights = {
            name: tempered(_known(squares[name] / mean.clamp(min=1e-30)), linear)
            for name, linear in linears(block).items()
            if name in squares
        }
        alike = torch.ones(own.stop, self.found.groups)
        weights = {name: weights.get(name, alike)[own] for name in linears(block)}
        return BlockGuide(weights, output, self.fitted, self.team)

    def _together(self, squares: dict[str, Tensor]) -> tuple[dict[str, Tensor], slice]:
        """What all processes found, tokens one behind the other; and which of them are ours."""
        parts = self.team.gather((self.found.windows.numel(), squares))
        sizes = [size for size, _ in parts]
        start = sum(sizes[: self.team.rank])
        nothing = [torch.full((size, self.found.groups), torch.nan) for size in sizes]
        names = dict.fromkeys(name for _, found in parts for name in found)
        whole = {
            name: torch.cat([p.get(name, n) for (_, p), n in zip(parts, nothing, strict=True)])
            for name in names
        }
        return whole, slice(start, start + sizes[self.team.rank])


@dataclass(slots=True)
class BlockGuide:
    """weights `[tokens, groups]` by linear; output: the gradient of the held-back windows."""

    weights: dict[str, Tensor]
    output: Tensor
    fitted: int
    team: Team

    def cost(
        self, walk: Walk, i: int, block: nn.Module, states: HiddenStates
    ) -> Callable[[], Tensor]:
        """(g_tᵀ Δh_t)² on the held-back windows, of what is made of block i after this call: the
        sum of each stretch of tokens."""
        gradient = self.output
        wanted = [walk.run(i, block, states[rows]) for rows in self._held(walk, states)]

        def now() -> Tensor:
            costs, at = [torch.empty(0, dtype=torch.float64)], 0
            for rows, expected in zip(self._held(walk, states), wanted, strict=True):
                moved = walk.run(i, block, states[rows]) - expected
                g = gradient[at : at + len(moved)].to(moved)
                costs.append((moved * g).sum(-1).double().square().flatten().cpu())
                at += len(moved)
            stretches = torch.split(torch.cat(self.team.gather(torch.cat(costs))), STRETCH)
            return torch.stack([part.sum() for part in stretches])

        return now

    def _held(self, walk: Walk, states: HiddenStates) -> list[slice]:
        step = walk.slices(states)[0].stop
        return [slice(k, k + step) for k in range(self.fitted, len(states), step)]


def compared(guided: Tensor, unguided: Tensor, rounding: Tensor) -> Costs:
    """What two ways cost in each stretch `[n]`, beside plain rounding."""
    sums = [float(each.sum().clamp(min=1e-30)) for each in (guided, unguided, rounding)]
    shares, n = guided / sums[0] - unguided / sums[1], len(guided)
    error = float(shares.square().sum().sqrt()) * math.sqrt(n / max(1, n - 1))
    return {"guided": sums[0] / sums[2], "unguided": sums[1] / sums[2], "error": error}


def held_back(windows: int) -> int:
    """How many of the calibration windows are held back: none of a single one."""
    return 0 if windows < 2 else min(MOST_HELD_BACK, max(1, windows // HELD_BACK))


def tempered(weights: Tensor, linear: StoredLinear) -> Tensor:
    """Weights `[tokens, groups]` to the largest power that leaves as many effective tokens (Kish)
    as the linear has inputs, or half of all; their mean stays as it is."""
    out = torch.empty_like(weights)
    wanted = min(linear.in_features, len(weights) / 2)
    for k, column in enumerate(weights.T):
        power = next(p for p in POWERS if p == 0 or effective(column**p) >= wanted)
        shaped = column**power
        out[:, k] = shaped * (column.mean() / shaped.mean().clamp(min=1e-30))
    return out


def effective(weights: Tensor) -> float:
    """Kish's effective number: as many equal weights would say as much."""
    return float(weights.sum() ** 2 / weights.square().sum().clamp(min=1e-30))


def _known(weights: Tensor) -> Tensor:
    """Tokens that the unquantized model routed elsewhere count as the mean of the others."""
    mean = weights.nanmean(0, keepdim=True).nan_to_num(1.0)
    return torch.where(weights.isnan(), mean, weights)
