"""ReLU models as they are: what the gate zeroes is not computed, and nothing is lost.

Nothing is solved here: the side file says that zeros may be skipped. Calibration text only tells
how many there are.
"""

from pathlib import Path

import torch
from torch import Tensor

from optim.prune.calibrate import See, calibrate
from optim.prune.plan import Plan, Progress, Solved

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
