"""`optim prune`: flags over a recipe, then the plan, then the work."""

from typing import Any

from optim.cli import prosparse, ui
from optim.cli.quantize import How
from optim.recipes.build import build_recipe, to_yaml
from optim.recipes.errors import USAGE, OptimError
from optim.recipes.schema import Recipe


def prune(
    file_or_name: str | None,
    keys: dict[str, Any],
    sets: list[str],
    how: How,
    *,
    print_recipe: bool,
    dry_run: bool,
) -> None:
    """Build the recipe of the command line, and print it, plan it or do it."""
    if "prune.method" not in keys and not file_or_name:
        keys = {"prune.method": _fitting_method(keys.get("model"), sets)} | keys
    recipe = build_recipe(file_or_name, keys, sets)
    if print_recipe:
        ui.say(to_yaml(recipe).rstrip("\n"))
        return
    if recipe.model is None:
        raise OptimError("no model is given", "optim prune MODEL; `demo` is one", USAGE)
    ui.notes.quiet = how.quiet
    _work(recipe, how, dry_run)


def _fitting_method(model: str | None, sets: list[str]) -> str | None:
    """What a model is pruned with where nobody says: exactly if it has ReLU, else by thresholds."""
    if any(text.startswith("prune.method=") for text in sets):
        return None
    if model is None:
        return "threshold"
    from optim.prune.plan import is_relu
    from optim.runtime.checkpoint import open_checkpoint

    if is_relu(open_checkpoint(model)):
        ui.note("a ReLU model: its zeros are skipped without loss (-m relu-exact)")
        return "relu-exact"
    return "threshold"


def _work(recipe: Recipe, how: How, dry_run: bool) -> None:
    ui.wait_quietly()
    if recipe.prune is not None and recipe.prune.method == "prosparse":
        prosparse.work(recipe, how, dry_run)
        return
    from optim.prune.run import plan, prune

    made = plan(
        recipe,
        force=how.force,
        device=how.device,
        threads=how.threads,
        trust_remote_code=how.trust_remote_code,
    )
    if dry_run:
        _show_plan(made.as_dict(), how.as_json)
        return
    assert recipe.prune is not None
    try:
        with ui.progress(recipe.prune.method) as step:
            report = prune(made, step)
    except KeyboardInterrupt:
        ui.note("stopped; the same command starts again")
        raise
    _show_report(report.as_dict(), how.as_json)


def _show_plan(plan: dict[str, Any], as_json: bool) -> None:
    """Print what would be done."""
    if as_json:
        ui.emit(plan)
        return
    ui.say(f"{plan['model']} · {plan['blocks']} blocks · {plan['neurons']} neurons each")
    total = sum(plan["sizes"].values())
    rows = [(site, ui.count(n), f"{n / total:.0%}") for site, n in plan["sizes"].items()]
    ui.table(("site", "weights a block", "share"), rows)
    ui.say(f"calibration {plan['calibration']}")
    for text in plan["notes"]:
        ui.note(text)
    ui.note(f"nothing was written; the output would be {plan['output']}")


def _show_report(report: dict[str, Any], as_json: bool) -> None:
    """Say what was made."""
    for text in report["notes"]:
        ui.note(text)
    if as_json:
        ui.emit(report)
    facts = [
        report["output"],
        f"side file {ui.size(report['side_bytes'])}",
        ui.seconds(report["seconds"]),
    ]
    ui.done(" · ".join(facts), following=f"optim run {report['output']}")
