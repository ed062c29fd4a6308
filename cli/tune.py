"""`optim tune`: better scales and norms for a packed artifact, in the format it has."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from optim.cli import ui
from optim.cli.compress import How, carry_out
from optim.recipes.build import build_recipe
from optim.recipes.errors import USAGE, OptimError


@dataclass(frozen=True, slots=True)
class Training:
    """How long and how fast."""

    epochs: int
    lr: float


def tune(
    source: str, against: str, output: str | None, text: dict[str, Any], asked: Training, how: How
) -> None:
    """Train, write the tuned artifact, and say what it was worth on held-back text."""
    if asked.epochs < 1:
        raise OptimError("--epochs must be at least 1", "3 passes are usual", USAGE)
    if not 0 < asked.lr <= 1:
        raise OptimError("--lr must be above 0 and at most 1", "1e-3 is usual", USAGE)
    keys = {f"calibration.{key}": value for key, value in text.items()}
    calibration = build_recipe(None, keys | {"quantize.method": "awq"}, []).calibration
    ui.notes.quiet = how.quiet
    from optim.quant.tune.run import tune as work
    from optim.quant.tune.train import Asked

    place = output or f"{source.rstrip('/')}-tuned"
    settings = Asked(asked.epochs, asked.lr, seed=calibration.seed)
    run = partial(
        work,
        source,
        against,
        place,
        calibration,
        settings,
        force=how.force,
        device=how.device,
        threads=how.threads,
    )
    carry_out("tune", run, how, _facts, against=against)


def _facts(report: dict[str, Any]) -> list[str]:
    return [
        ui.size(report["output_bytes"]),
        f"KL {report['kl'][0]:.4f} -> {min(report['kl']):.4f}",
        ui.seconds(report["seconds"]),
    ]
