"""Pictures of measurements: asked for before any work, since what draws them may be missing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from optim.recipes.errors import MACHINE, USAGE, OptimError

Axes = Callable[[str, str], tuple[Any, Callable[[], None]]]


def axes_for(name: str) -> Axes:
    """What makes axes from two labels, and the function that saves them as the picture `name`.

    Raises OptimError: 4 without matplotlib, 2 for a place that cannot be written.
    """
    path = Path(name)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        fix = "pip install matplotlib, or leave --plot out"
        raise OptimError("--plot needs matplotlib, which is not installed", fix, MACHINE) from None
    if path.suffix != ".png" or path.is_dir() or not path.absolute().parent.is_dir():
        raise OptimError(f"{path} cannot be written as a picture", "--plot FILE.png", USAGE)

    def axes(across: str, upwards: str) -> tuple[Any, Callable[[], None]]:
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        made = figure.add_subplot(xlabel=across, ylabel=upwards)
        made.grid(alpha=0.3)
        return made, lambda: figure.savefig(path, dpi=150)

    return axes
