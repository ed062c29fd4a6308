"""Thresholds on the inputs of linears, from calibration text (TEAL, arXiv 2408.14690).

An input x_k with |x_k| <= t leaves out column k of the weight. A tensor's t is the quantile of |x|
at the sparsity wanted of it. `uniform` wants the same of all; `greedy` measures for each site of a
block what the block's output loses, relative to what the block adds,

    loss(site, p) = ||y - y_sparse||^2 / ||y - x||^2        with this site alone at sparsity p

and shares the block's budget out. `only` restricts it: the feed-forward, down_proj alone, or
(`gate`, CATS, arXiv 2404.08763) act(gate), which leaves out rows of up and columns of down.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optim.prune.allocate import allocate
from optim.prune.calibrate import See, Seen, calibrate
from optim.prune.pruner import Candidate, Plan, Progress, Pruner, Solved
from optim.recipes.schema import Threshold
from optim.runtime.sparsity.core_neurons import Guide
from optim.runtime.sparsity.rules import sparsify
from optim.runtime.sparsity.side_file import BlockSide
from optim.runtime.storage.checkpoint import Checkpoint

LEVELS = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
SAFE = 0.3  # sparsity of all linears beyond which small models lose much
SMALL = 1e9  # weights
SAMPLE = 1 << 20  # absolute values of a tensor that quantiles are taken of
FEW_TOKENS = 512  # on which a block's loss is measured
SITES_OF = {
    "all": ("qkv", "out", "up", "down"),
    "ffn": ("up", "down"),
    "down": ("down",),
    "gate": ("gate",),
}


class Magnitudes:
    """A sample of |x| for each site of one block."""

    def __init__(self, tokens: int, sites: tuple[str, ...]) -> None:
        self.tokens = tokens
        self.parts: dict[str, list[Tensor]] = {site: [] for site in sites}

    def see(self, site: str, x: Tensor) -> None:
        """Keep every so many tokens of `x` `[b, t, n]`."""
        if site not in self.parts:
            return
        flat = x.reshape(-1, x.shape[-1])
        step = max(1, self.tokens * x.shape[-1] // SAMPLE)
        self.parts[site].append(flat[::step].abs().flatten().float())

    def quantiles(self, site: str, levels: list[float]) -> list[float]:
        """|x| below which a share `levels` of the site's inputs lie."""
        ranked = torch.cat(self.parts[site]).sort().values
        last = len(ranked) - 1
        return [float(ranked[round(level * last)]) if level else -1.0 for level in levels]


def solve(made: Plan, windows: Tensor, folder: Path, progress: Progress) -> Solved:
    """Thresholds of every block: tensors for the side file, and facts for the manifest."""
    section = made.recipe.prune
    assert isinstance(section, Threshold)
    current: list[Magnitudes] = []

    def see(_i: int) -> See:
        current[:] = [Magnitudes(windows.numel(), SITES_OF[section.only])]
        return current[0].see

    few = max(1, FEW_TOKENS // windows.shape[1])
    tensors, rows = dict[str, Tensor](), list[dict[str, Any]]()
    for block in calibrate(made.walk, made.facts, windows, folder, see, few):
        levels, loss = _levels(made, block, current[0], section)
        for site, level in levels.items():
            (t,) = current[0].quantiles(site, [level])
            tensors[f"{made.facts.layers}.{block.index}.{site}.threshold"] = torch.tensor(t)
        rows.append({"sparsity": levels, "loss": loss})
        progress(block.index + 1, len(made.walk), f"block {block.index} · loss {loss:.1e}")
    return Solved(tensors, rows, [])


def _levels(
    made: Plan, block: Seen, magnitudes: Magnitudes, section: Threshold
) -> tuple[dict[str, float], float]:
    """The sparsity of each site of a block, and the loss that adds up to."""
    sites = SITES_OF[section.only]
    levels = dict.fromkeys(sites, section.sparsity)
    if section.allocation == "greedy" and len(sites) > 1 and section.sparsity > 0:
        losses = {
            site: [0.0]
            + [block_loss(made, block, {site: t}) for t in magnitudes.quantiles(site, LEVELS)[1:]]
            for site in sites
        }
        sizes = {site: float(made.sizes[site]) for site in sites}
        levels = allocate(losses, sizes, LEVELS, section.sparsity)
    thresholds = {site: magnitudes.quantiles(site, [levels[site]])[0] for site in sites}
    return levels, block_loss(made, block, thresholds)


def block_loss(made: Plan, seen: Seen, thresholds: dict[str, float]) -> float:
    """What the block's output loses under `thresholds`, relative to what the block adds."""
    gate = thresholds.get("gate")
    rules = BlockSide({s: t for s, t in thresholds.items() if s != "gate"}, gate, None)
    skips = sparsify(seen.block, made.facts, rules, Guide.none(), 0)
    out = made.walk.run(seen.index, seen.block, seen.inputs)
    skips.remove()
    return seen.loss(out)


def _check(section: Threshold, candidate: Candidate) -> None:
    if section.only == "gate":
        candidate.require_gate()


def _notes(section: Threshold, checkpoint: Checkpoint) -> Iterator[str]:
    if section.only == "all" and section.sparsity > SAFE:
        weights = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
        small = "; models below 1 B bear 25 % (--sparsity 0.25)" if weights < SMALL else ""
        yield (
            f"{section.sparsity:.0%} is much: perplexity of demo x1.02 at 25 %, x1.13 at 40 %, "
            f"x1.4 at 50 %{small}"
        )
    if (checkpoint.quantization or {}).get("quant_method"):
        yield (
            "beside 4 bits a CPU skips inputs of linears with 3,072 outputs or more only: reading "
            "the others whole is as fast"
        )


def _form(section: Threshold) -> str:
    only = "" if section.only == "all" else f"-{section.only}"
    return f"threshold{only}-s{round(100 * section.sparsity)}"


THRESHOLD = Pruner(_form, solve, _check, _notes)
