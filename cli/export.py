"""`optim export`: a model in the form of another program."""

from functools import partial
from typing import Any

from optim.cli import ui
from optim.cli.apply.several import several
from optim.cli.compress import carry_out, only_planned, recipe_of
from optim.cli.options import How
from optim.recipes.meetings import sections
from optim.recipes.schema import Export, Recipe


def export(file_or_name: str | None, keys: dict[str, Any], how: How) -> None:
    """Build the recipe of the command line, and print it, plan it or do it."""
    if keys.get("export.format") is None and not file_or_name:
        keys = keys | {"export.format": Export.model_fields["format"].default}
    recipe = recipe_of("export", file_or_name, keys, [], how)
    if recipe is None:
        return
    if len(sections(recipe)) > 1:
        return several(recipe, file_or_name, how)
    work(recipe, how)


def work(recipe: Recipe, how: How) -> None:
    """The plan, and the work unless it is a dry run."""
    assert recipe.model is not None and recipe.export is not None
    from optim.export.run import export, plan

    if how.threads:
        import torch

        torch.set_num_threads(how.threads)
    made = plan(
        recipe.model,
        recipe.export,
        recipe.output,
        force=how.force,
        trust_remote_code=how.trust_remote_code,
    )
    if not only_planned(made.as_dict(), how, _show_plan):
        carry_out("export", partial(export, made), how, _facts, against=recipe.model)


def _show_plan(plan: dict[str, Any]) -> None:
    ui.say(f"{plan['model']} · {ui.size(plan['source_bytes'])} · format {plan['format']}")
    _show_weights(plan["weights"])
    ui.say(f"output about {ui.size(plan['output_bytes'])}")


def _show_weights(rows: list[dict[str, Any]]) -> None:
    cells = [
        (
            row["from"],
            row["to"],
            row["change"] or "none",
            str(row["tensors"]),
            ui.count(row["params"]),
            ui.size(row["nbytes"]),
        )
        for row in rows
    ]
    ui.table(("was", "will be", "change", "tensors", "params", "size"), cells, left=3)


def _facts(report: dict[str, Any]) -> list[str]:
    same = sum(row["params"] for row in report["weights"] if not row["change"])
    total = sum(row["params"] for row in report["weights"])
    return [
        f"{report['format']}, {ui.size(report['output_bytes'])} of weights",
        f"{same / max(total, 1):.1%} of the weights unchanged",
        ui.seconds(report["seconds"]),
    ]
