"""`optim compare`: several models side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optim.cli import ui
from optim.cli.options import Comparing
from optim.cli.plots import Axes, axes_for
from optim.recipes.errors import USAGE, OptimError

HEADS = ("model", "size", "bits/w", "perplexity", "change", "KL", "same top", "tok/s")


def compare(sources: Sequence[str], asked: Comparing) -> None:
    """Measure and print; the base is `--against`, or the first model."""
    base, others = asked.against, sources
    if base is None:
        base, others = sources[0], sources[1:]
    others = [source for source in others if source != base]
    if not others:
        fix = "name another, or the original with --against"
        raise OptimError("there is only one model to compare", fix, USAGE)
    ui.notes.quiet = asked.quiet
    draw = None if asked.plot is None else axes_for(asked.plot)
    from optim.runtime.measure.compare import compare as measure

    with ui.progress("compare") as step:
        compared = measure(
            base,
            others,
            text=asked.text,
            window=asked.window,
            max_windows=asked.max_windows,
            speed=not asked.no_speed,
            device=asked.device,
            threads=asked.threads,
            progress=step,
        )
        rows = [row.as_dict() for row in compared]
    if asked.json:
        ui.emit({"text": asked.text, "window": asked.window, "models": rows})
    else:
        ui.table(HEADS, map(_cells, rows))
        windows = f"{asked.max_windows} windows of {asked.window} tokens from {asked.text}"
        ui.say(f"{windows}; change and KL against {base}")
    if draw is not None:
        _draw(draw, rows)
        ui.done(f"{asked.plot}")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    compared = row["kl"] is not None
    error = "" if row["kl_error"] is None else f" ± {row['kl_error']:.4f}"
    speed = row["tokens_per_second"]
    return (
        row["model"],
        ui.size(row["nbytes"]),
        f"{row['bits_per_weight']:.2f}",
        f"{row['perplexity']:.3f}",
        f"{row['ppl_ratio'] - 1:+.2%}" if compared else "",
        f"{row['kl']:.4f}{error}" if compared else "",
        f"{row['same_top']:.1%}" if compared else "",
        "" if speed is None else f"{speed:.1f}",
    )


def _draw(draw: Axes, rows: list[dict[str, Any]]) -> None:
    axes, save = draw("bytes of weights, MB", "KL from the original, nats a token")
    for row in rows:
        point = row["nbytes"] / 1e6, row["kl"] or 0.0
        axes.errorbar(*point, yerr=row["kl_error"] or 0.0, fmt="o", capsize=3)
        name = Path(row["model"]).name.replace("$", r"\$")
        axes.annotate(name, point, xytext=(6, 6), textcoords="offset points")
    axes.set_ylim(bottom=0)
    save()
