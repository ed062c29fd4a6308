"""`optim eval --tasks`: the tasks of lm-eval, answered by a model."""

from dataclasses import asdict

from optim.cli import ui
from optim.cli.options import Evaluating
from optim.recipes.errors import MACHINE, USAGE, OptimError


def tasks(source: str, wanted: str, asked: Evaluating) -> None:
    """Ask the tasks `wanted`, names with commas between, and print a row a metric."""
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if not names:
        raise OptimError("--tasks names no task", "--tasks hellaswag,arc_easy", USAGE)
    ui.notes.quiet = asked.quiet
    try:
        from optim.runtime.measure.tasks import run_tasks
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("lm_eval"):
            raise
        fix = 'pip install "optim-llm[eval]"'
        raise OptimError("--tasks needs lm-eval, which is not installed", fix, MACHINE) from None
    from optim.runtime.engine.load import load_model

    model = load_model(source, device=asked.device, threads=asked.threads)
    with ui.progress("eval") as step:
        scores = run_tasks(model, names, asked.limit, asked.shots, step)
    if asked.json:
        ui.emit({"model": source, "scores": [asdict(score) for score in scores]})
        return
    rows = [
        (s.task, s.metric, f"{s.value:.4f}" + ("" if s.error is None else f" ± {s.error:.4f}"))
        for s in scores
    ]
    ui.table(("task", "metric", source), rows)
