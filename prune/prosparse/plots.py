"""The history of a training as pictures, where matplotlib is installed."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from optim.prune.prosparse.train import Point

SIZE, DPI = (7.0, 4.0), 120


def plot(history: Sequence[Point], folder: Path) -> list[str]:
    """Write `loss.png` and `sparsity.png` into `folder`; their names, none without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    made: list[tuple[str, Any]] = []
    for name, draw in (("loss.png", _losses), ("sparsity.png", _zeros)):
        figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
        axes = figure.add_subplot()
        draw(axes, history)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        made.append((name, figure))
    for name, figure in made:  # without the date, so that equal runs give equal files
        figure.savefig(folder / name, metadata={"Software": None})
    return [name for name, _ in made]


def _losses(axes: Any, history: Sequence[Point]) -> None:
    steps = [point.step + 1 for point in history]
    axes.plot(steps, [p.kl for p in history], label="KL from the teacher")
    axes.plot(steps, [p.square_head for p in history], label="SquareHead, all blocks")
    axes.set_yscale("log")
    axes.set_ylabel("loss")
    weights = axes.twinx()
    weights.plot(steps, [p.l1_weight for p in history], color="grey", lw=0.8, ls="--")
    weights.set_ylabel("lambda (dashed)", color="grey")


def _zeros(axes: Any, history: Sequence[Point]) -> None:
    """Each quarter of the blocks a line, and their mean."""
    steps = [point.step + 1 for point in history]
    count = len(history[0].zeros)
    quarters = sorted({round(k * count / 4) for k in range(5)})
    for first, end in pairwise(quarters):
        label = f"blocks {first} to {end - 1}" if end - first > 1 else f"block {first}"
        values = [100 * sum(p.zeros[first:end]) / (end - first) for p in history]
        axes.plot(steps, values, lw=0.8, label=label)
    axes.plot(steps, [100 * p.sparsity for p in history], color="black", label="mean")
    axes.set_ylabel("zeros in x1, %")
    axes.set_ylim(0, 100)
