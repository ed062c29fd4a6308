"""ReLU models as they are: what the gate zeroes is not computed, and nothing is lost.

Nothing is solved here: the side file says that zeros may be skipped. Calibration text only tells
how many there are.
"""

from pathlib import Path

import torch
from torch import Tensor

from optim.prune.calibrate import See, calibrate
from optim.prune.pruner import Candidate, Plan, Progress, Pruner, Solved
from optim.recipes.errors import USAGE, OptimError
from optim.recipes.schema import ReluExact
from optim.runtime.architecture.shape import resolve
from optim.runtime.architecture.table import FAMILIES
from optim.runtime.storage.checkpoint import Checkpoint

WORTH = 0.3  # below this share of zeros, listing them gains next to nothing


def solve(made: Plan, windows: Tensor, folder: Path, progress: Progress) -> Solved:
    """Threshold 0 for every block, and its share of zeros on the calibration text."""
    zeros = [0, 0]

    def look(site: str, x: Tensor) -> None:
        if site == "down":
            zeros[0] += int((x == 0).sum())
            zeros[1] += x.numel()

    def see(_i: int) -> See:
        zeros[:] = [0, 0]
        return look

    tensors, rows = dict[str, Tensor](), []
    for seen in calibrate(made.walk, made.facts, windows, folder, see, 1):
        tensors[f"{made.facts.layers}.{seen.index}.gate.threshold"] = torch.tensor(0.0)
        share = zeros[0] / max(zeros[1], 1)
        rows.append({"zeros": share})
        progress(seen.index + 1, len(made.walk), f"block {seen.index} · {share:.0%} zeros")
    mean = sum(row["zeros"] for row in rows) / len(rows)
    notes = [f"{mean:.0%} of the neurons are zero on the calibration text"]
    if mean < WORTH:
        notes.append("so few zeros hardly pay")
    return Solved(tensors, rows, notes)


def is_relu(checkpoint: Checkpoint) -> bool:
    """Whether the model's feed-forward gives exact zeros; False for families that are unknown."""
    facts = FAMILIES.get(checkpoint.family)
    return facts is not None and resolve(checkpoint.settings, facts.decoder).activation == "relu"


def _check(section: ReluExact, candidate: Candidate) -> None:
    if not is_relu(candidate.checkpoint):
        what = (
            f"{candidate.checkpoint.source} is no ReLU model: its activation gives no exact zeros"
        )
        fix = "leave out what is small: -m threshold; or train it: -m prosparse"
        raise OptimError(what, fix, USAGE)
    candidate.require_gate()


RELU_EXACT = Pruner(lambda section: section.method, solve, _check, reads_text=False)
