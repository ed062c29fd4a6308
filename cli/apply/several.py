"""A recipe of several sections: its plan shown, or the work done."""

from functools import partial
from pathlib import Path
from typing import Any

from optim.cli import ui
from optim.cli.apply import steps
from optim.cli.apply.plan import plan
from optim.cli.compress import carry_out, only_planned
from optim.cli.options import How
from optim.recipes.meetings import sections
from optim.recipes.schema import Recipe


def several(recipe: Recipe, file_or_name: str | None, how: How, keep: bool = False) -> None:
    """Plan all sections, and do them unless it is a dry run.

    The output's default name ends like the recipe. Raises OptimError as the sections' commands do,
    what later steps would refuse before the first one.
    """
    from optim.runtime.system.torchrun import need_one

    named = sections(recipe)
    fix = "under torchrun quantize alone, and do the rest afterwards"
    need_one("a recipe of several sections", fix)
    name = Path(file_or_name).stem if file_or_name else "-".join(named)
    job = plan(recipe, name, how, keep)
    if not only_planned(job.as_dict(), how, _show_plan):
        carry_out(
            ", ".join(named), partial(steps.carry_out, job), how, _facts, against=recipe.model
        )


def _show_plan(plan: dict[str, Any]) -> None:
    made = plan["steps"]
    ui.say(f"{plan['model']}: {', then '.join(made)}")
    if "quantize" in made:
        ui.size_table(made["quantize"]["groups"])
        ui.say(f"peak memory about {ui.size(made['quantize']['peak_bytes'])}")
    if "tune" in made:
        tune = made["tune"]
        ui.say(f"tune: scales and norms, {tune['epochs']} passes over {tune['calibration']}")
    if "prune" in made:
        ui.say(f"prune: measured on what is quantized, {made['prune']['calibration']}")
    if "pack" in made:
        ui.say(f"pack: what stays bf16, without loss ({made['pack']['layout']})")
    if "export" in made:
        size = ui.size(made["export"]["output_bytes"])
        ui.say(f"export: {plan['exported']}, about {size} ({made['export']['format']})")


def _facts(report: dict[str, Any]) -> list[str]:
    facts = [ui.size(report["output_bytes"] or 0), ui.seconds(report["seconds"])]
    return [*facts, f"and {report['exported']}"] if report["exported"] else facts
