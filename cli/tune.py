"""`optim tune`: better scales and norms for a packed artifact, in the format it has."""

from functools import partial
from typing import Any

from optim.cli import ui
from optim.cli.compress import carry_out
from optim.cli.options import How, Tuning
from optim.recipes.build import build_recipe
from optim.recipes.errors import USAGE, OptimError


def tune(source: str, against: str, output: str | None, tuning: Tuning, how: How) -> None:
    """Train, write the tuned artifact, and say what it was worth on held-back text."""
    from optim.runtime.system.torchrun import need_one

    need_one("tune", "run it without torchrun")
    if tuning.epochs < 1:
        raise OptimError("--epochs must be at least 1", "3 passes are usual", USAGE)
    if not 0 < tuning.lr <= 1:
        raise OptimError("--lr must be above 0 and at most 1", "1e-3 is usual", USAGE)
    keys = {
        "quantize.method": "awq",
        "calibration.dataset": tuning.calibration,
        "calibration.num_samples": tuning.num_samples,
        "calibration.seq_len": tuning.seq_len,
        "calibration.seed": tuning.seed,
    }
    calibration = build_recipe(None, keys, []).calibration
    ui.notes.quiet = how.quiet
    from optim.quant.tune.run import tune as work
    from optim.quant.tune.train import Asked

    place = output or f"{source.rstrip('/')}-tuned"
    settings = Asked(tuning.epochs, tuning.lr, seed=calibration.seed)
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
