"""CoreInfer: how many neurons each block keeps, and what calibration text says of them.

The neurons themselves are chosen at run time (runtime/sparsity/core_neurons.py). Here the prior,
the means and the column norms are gathered, and with `budget: measured` the number of each block: a
block is made sparse alone, the states go on through the dense blocks after it, and the divergence
of the logits is what it costs. All those runs walk side by side, so each block is loaded once:

    loss_i(keep) = KL_i(target) * e_i(keep) / e_i(target)

with e_i the error of the block's own output, which gives the curve its shape.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optim.prune.allocate import allocate
from optim.prune.calibrate import See, Seen, calibrate
from optim.prune.clusters import group
from optim.prune.pruner import Candidate, Plan, Progress, Pruner, Solved
from optim.recipes.errors import USAGE, OptimError
from optim.recipes.schema import CoreInfer
from optim.runtime.sparsity.core_neurons import Guide, scores
from optim.runtime.sparsity.rules import sparsify
from optim.runtime.sparsity.side_file import BlockSide, Core, Side
from optim.runtime.storage.checkpoint import Checkpoint

LEVELS = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]  # shares dropped
FEW_TOKENS = 512  # on which losses are measured


class Gathered:
    """One block's scores a window `[windows, neurons]`, and the sum of its activations."""

    def __init__(self, options: dict[str, Any], norm: Tensor) -> None:
        self.options, self.norm = options, norm
        self.scores: list[Tensor] = []
        self.sum, self.tokens = torch.zeros(1), 0

    def see(self, site: str, x: Tensor) -> None:
        """`x` `[b, t, neurons]`, where the site is `down`."""
        if site == "down":
            self.scores += [scores(row, self.norm, self.options) for row in x]
            self.sum = self.sum + x.sum((0, 1))
            self.tokens += x.shape[0] * x.shape[1]


@dataclass(slots=True)
class Alone:
    """The states of the runs in which one block alone is sparse, and that block's error curve."""

    states: list[Tensor]
    curves: list[list[float]]


def solve(made: Plan, windows: Tensor, folder: Path, progress: Progress) -> Solved:
    """Priors, means, norms and numbers of every block for the side file."""
    section = made.recipe.prune
    assert isinstance(section, CoreInfer)
    cores, alone, guide = list[Core](), Alone([], []), Guide.none()
    measured = section.budget == "measured" and section.keep < 1
    dense = windows[:0].float()
    for seen, core, guide in _cores(made, section, windows, folder):
        cores.append(core)
        if measured:
            alone.states = [made.walk.run(seen.index, seen.block, s) for s in alone.states]
            _measure(made, seen, core, guide, alone)
        dense = seen.outputs
        progress(seen.index + 1, len(made.walk), f"block {seen.index}")
    levels = [1 - section.keep] * len(cores)
    costs: list[float | None] = [None] * len(cores)
    if measured:
        losses = _divergences(made, windows[: len(dense)], dense, alone.states)
        levels = share(alone.curves, losses, section.keep, section.keep)
        costs = list(losses)
    tensors = _tensors(made, cores, levels)
    if guide.side.centroids is not None:
        tensors["centroids"] = guide.side.centroids
    rows: list[dict[str, Any]] = [
        {"keep": 1 - x, "kl_alone": kl} for x, kl in zip(levels, costs, strict=True)
    ]
    for row, curve in zip(rows, alone.curves, strict=False):
        row["errors"] = curve
    return Solved(tensors, rows, [])


def _cores(
    made: Plan, section: CoreInfer, windows: Tensor, folder: Path
) -> Iterator[tuple[Seen, Core, Guide]]:
    """Each block with what calibration text says of its neurons, and the clusters of block 0."""
    options = section.model_dump(mode="json")
    current: list[Gathered] = []

    def see(i: int) -> See:
        current[:] = [Gathered(options, _norms(made, i))]
        return current[0].see

    guide, kinds = Guide.none(), torch.zeros(len(windows), dtype=torch.int64)
    few = max(1, FEW_TOKENS // windows.shape[1])
    for seen in calibrate(made.walk, made.facts, windows, folder, see, few):
        gathered = current[0]
        of_windows = torch.stack(gathered.scores)
        if seen.index == 0:
            centroids, kinds = group(of_windows, section)
            guide = Guide(Side("coreinfer", options, (), centroids), kinds[:few].tolist())
        prior = _prior(of_windows, kinds, guide.side.centroids) if section.prior else None
        mean = gathered.sum / gathered.tokens if section.bias else None
        keep = max(1, round(section.keep * made.neurons))
        yield seen, Core(keep, prior, mean, gathered.norm), guide


def _norms(made: Plan, i: int) -> Tensor:
    """Squared column norms of down_proj of block i: `[neurons]`."""
    name = f"{made.walk.prefix}.{i}.{made.facts.down}.weight"
    return made.walk.checkpoint.read(name).float().square().sum(0)


def _prior(of_windows: Tensor, kinds: Tensor, centroids: Tensor | None) -> Tensor:
    if centroids is None:
        return of_windows.sum(0)
    return torch.stack([of_windows[kinds == k].sum(0) for k in range(len(centroids))])


def _measure(made: Plan, seen: Seen, core: Core, guide: Guide, alone: Alone) -> None:
    """The block's own error at every level; its output at the target goes on by itself."""
    start = seen.inputs.shape[1] // 2
    curve = [0.0]
    for level in LEVELS[1:]:
        keep = max(1, round((1 - level) * made.neurons))
        curve.append(seen.loss(_sparse(made, seen, replace(core, keep=keep), guide, start), start))
    alone.curves.append(curve)
    alone.states.append(_sparse(made, seen, core, guide, start))


def _sparse(made: Plan, seen: Seen, core: Core, guide: Guide, start: int) -> Tensor:
    skips = sparsify(seen.block, made.facts, BlockSide({}, None, core), guide, start)
    out = made.walk.run(seen.index, seen.block, seen.inputs)
    skips.remove()
    return out


def _divergences(made: Plan, ids: Tensor, dense: Tensor, states: list[Tensor]) -> list[float]:
    """KL(dense || sparse) of the logits a token, for each run."""
    start = ids.shape[1] // 2
    base = made.walk.logits(ids[:, start:], dense[:, start:]).log_softmax(-1)
    found = []
    for state in states:
        logs = made.walk.logits(ids[:, start:], state[:, start:]).log_softmax(-1)
        found.append(float((base.exp() * (base - logs)).sum(-1).mean()))
    return found


def share(
    curves: list[list[float]], losses: list[float], measured: float, keep: float
) -> list[float]:
    """The share that each block drops, `1 - keep` on average; `losses` are at keep `measured`."""
    target = 1 - keep
    scaled = {}
    for i, (curve, loss) in enumerate(zip(curves, losses, strict=True)):
        at = _between(curve, 1 - measured)
        scaled[str(i)] = [loss * error / max(at, 1e-12) for error in curve]
    found = allocate(scaled, dict.fromkeys(scaled, 1.0), LEVELS, min(target, LEVELS[-1]))
    return [found[str(i)] for i in range(len(curves))]


def _between(curve: list[float], level: float) -> float:
    """The curve at `level`, between its points."""
    last = len(LEVELS) - 1
    k = min(int(level * 10), last - 1)
    share = level * 10 - k
    return curve[k] + share * (curve[k + 1] - curve[k])


def _tensors(made: Plan, cores: list[Core], levels: list[float]) -> dict[str, Tensor]:
    tensors = dict[str, Tensor]()
    for i, (core, level) in enumerate(zip(cores, levels, strict=True)):
        prefix = f"{made.facts.layers}.{i}"
        held = {"prior": core.prior, "mean": core.mean, "norm": core.norm}
        tensors |= {f"{prefix}.{k}": v for k, v in held.items() if v is not None}
        keep = max(1, round((1 - level) * made.neurons))
        tensors[f"{prefix}.keep"] = torch.tensor(keep)
    return tensors


def _check(section: CoreInfer, candidate: Candidate) -> None:
    if round(section.keep * candidate.neurons) < 1:
        what = f"keep {section.keep:g} of {candidate.neurons} neurons leaves none"
        raise OptimError(what, "keep more", USAGE)


def _notes(section: CoreInfer, checkpoint: Checkpoint) -> Iterator[str]:
    if section.keep == 1:
        return
    yield (
        "a fixed set of neurons is lossy: perplexity of demo x1.3 at keep 0.8, x2 at 0.6, "
        "x5 at 0.4 (x1.7 and x3 with measured budgets); thresholds lose less at the same bytes"
    )
    if section.score == "paper":
        yield "the paper's score ignores negative activations: x600 at keep 0.4 on demo"


def _form(section: CoreInfer) -> str:
    return f"coreinfer-k{round(100 * section.keep)}"


COREINFER = Pruner(_form, solve, _check, _notes)
