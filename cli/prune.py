"""`optim prune`: flags over a recipe, then the plan, then the work."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from optim.cli import prune_prosparse, ui
from optim.cli.apply.several import several
from optim.cli.compress import carry_out, only_planned, recipe_of
from optim.cli.options import How
from optim.recipes.meetings import sections
from optim.recipes.schema import Recipe

TRAINED = {"prosparse": prune_prosparse.work}
"""The methods that change the weights, which have a plan and a run of their own."""


def prune(file_or_name: str | None, keys: dict[str, Any], sets: Sequence[str], how: How) -> None:
    """Build the recipe of the command line, and print it, plan it or do it."""
    ui.notes.quiet = how.quiet
    if keys.get("prune.method") is None and not file_or_name:
        keys = keys | {"prune.method": _fitting_method(keys.get("model"), sets)}
    recipe = recipe_of("prune", file_or_name, keys, sets, how)
    if recipe is None:
        return
    if len(sections(recipe)) > 1:
        return several(recipe, file_or_name, how)
    work(recipe, how)


def work(recipe: Recipe, how: How) -> None:
    """The plan, and the work unless it is a dry run."""
    assert recipe.prune is not None
    TRAINED.get(recipe.prune.method, _measure)(recipe, how)


def _measure(recipe: Recipe, how: How) -> None:
    """The plan and the work of a method that leaves the weights as they are."""
    from optim.prune.run import plan, prune

    made = plan(recipe, **how.given)
    if how.dry_run:
        made.check_text()
    if only_planned(made.as_dict(), how, _show_plan):
        return
    assert recipe.prune is not None
    title, again = recipe.prune.method, "the same command starts again"
    carry_out(title, partial(prune, made), how, _facts, again, against=recipe.model)


def _fitting_method(model: str | None, sets: Sequence[str]) -> str | None:
    """What a model is pruned with where nobody says: exactly if it has ReLU, else by thresholds."""
    if any(text.startswith("prune.method=") for text in sets):
        return None
    if model is None:
        return "threshold"
    from optim.prune.relu_exact import is_relu
    from optim.runtime.storage.open import open_checkpoint

    if is_relu(open_checkpoint(model)):
        ui.note("a ReLU model: its zeros are skipped without loss (-m relu-exact)")
        return "relu-exact"
    return "threshold"


def _show_plan(plan: dict[str, Any]) -> None:
    ui.say(f"{plan['model']} · {plan['blocks']} blocks · {plan['neurons']} neurons each")
    total = sum(plan["sizes"].values())
    rows = [(site, ui.count(n), f"{n / total:.0%}") for site, n in plan["sizes"].items()]
    ui.table(("site", "weights a block", "share"), rows)
    ui.say(f"calibration {plan['calibration']}")


def _facts(report: dict[str, Any]) -> list[str]:
    return [f"side file {ui.size(report['side_bytes'])}", ui.seconds(report["seconds"])]
