"""`optim quantize`: flags over a recipe, then the plan, then the work."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from optim.cli import ui
from optim.cli.apply.several import several
from optim.cli.compress import carry_out, only_planned, recipe_of
from optim.cli.options import How
from optim.recipes.meetings import sections
from optim.recipes.schema import Recipe


def quantize(file_or_name: str | None, keys: dict[str, Any], sets: Sequence[str], how: How) -> None:
    """Build the recipe of the command line, and print it, plan it or do it."""
    if keys.get("quantize.method") is None and not file_or_name:
        keys = keys | {"quantize.method": "awq"}
    recipe = recipe_of("quantize", file_or_name, keys, sets, how)
    if recipe is None:
        return
    if len(sections(recipe)) > 1:
        return several(recipe, file_or_name, how)
    work(recipe, how)


def work(recipe: Recipe, how: How) -> None:
    """The plan, and the work unless it is a dry run."""
    from optim.quant.run import assist, plan, quantize
    from optim.runtime.system.devices import own_device
    from optim.runtime.system.torchrun import leads

    made = plan(recipe, **replace(how, device=own_device(how.device)).given)
    if how.dry_run:
        made.check_text()
    facts: dict[str, Any] = made.as_dict()
    if how.dry_run:
        facts |= _estimated(facts["products"], how.device)
    if only_planned(facts, how, _show_plan):
        return
    assert recipe.quantize is not None
    if not leads():
        return assist(made)
    title = recipe.quantize.method
    carry_out(title, partial(quantize, made), how, _facts, against=recipe.model)


def _estimated(products: int, device: str) -> dict[str, Any]:
    """Seconds that this machine needs for so many products now, and the memory that is free."""
    from optim.runtime.system.devices import own_device, pick_device
    from optim.runtime.system.memory import available_bytes
    from optim.runtime.system.products import products_a_second

    seconds = products / products_a_second(pick_device(own_device(device)))
    return {"estimated_seconds": round(seconds, 1), "available_bytes": available_bytes()}


def _show_plan(plan: dict[str, Any]) -> None:
    ui.say(f"{plan['model']} · {plan['blocks']} blocks · {ui.size(plan['source_bytes'])}")
    ui.size_table(plan["groups"])
    times, word = plan["source_bytes"] / plan["output_bytes"], "smaller"
    if times < 1:
        times, word = 1 / times, "larger"
    free = plan["available_bytes"]
    known = "" if free is None else f" of {ui.size(free)} free"
    if free is not None and plan["peak_bytes"] > free:
        known += ": too little"
    ui.say(
        f"output {ui.size(plan['output_bytes'])} ({times:.1f}x {word}) · "
        f"peak memory about {ui.size(plan['peak_bytes'])}{known} · "
        f"disk {ui.size(plan['disk_bytes'])}"
    )
    ui.say(f"calibration {plan['calibration']}")
    if plan["products"]:
        about = ui.seconds(plan["estimated_seconds"])
        ui.say(f"time about {about}, an estimate: its matrix products at this moment's speed")


def _facts(report: dict[str, Any]) -> list[str]:
    return [
        ui.size(report["output_bytes"]),
        f"{report['bits_per_weight']:.2f} bits/weight",
        ui.seconds(report["seconds"]),
    ]
