"""`optim quantize`: flags over a recipe, then the plan, then the work."""

from dataclasses import dataclass
from typing import Any

from optim.cli import sizes, ui
from optim.recipes.build import build_recipe, to_yaml
from optim.recipes.errors import USAGE, OptimError
from optim.recipes.schema import Recipe


@dataclass(frozen=True, slots=True)
class How:
    """What is not in the recipe: where and how to do the work."""

    device: str
    threads: int | None
    trust_remote_code: bool
    force: bool
    as_json: bool
    quiet: bool


def word(text: str | None) -> Any:
    """A flag that takes a word or a number, as YAML reads it."""
    from optim.recipes.yaml_source import parse_value

    return None if text is None else parse_value(text, "the flag")


def quantize(
    file_or_name: str | None,
    keys: dict[str, Any],
    sets: list[str],
    how: How,
    *,
    print_recipe: bool,
    dry_run: bool,
) -> None:
    """Build the recipe of the command line, and print it, plan it or do it."""
    recipe = build_recipe(file_or_name, keys, sets)
    if print_recipe:
        ui.say(to_yaml(recipe).rstrip("\n"))
        return
    if recipe.model is None:
        raise OptimError("no model is given", "optim quantize MODEL; `demo` is one", USAGE)
    ui.notes.quiet = how.quiet
    _work(recipe, how, dry_run)


def _work(recipe: Recipe, how: How, dry_run: bool) -> None:
    ui.wait_quietly()
    from optim.quant.run import plan, quantize

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
    assert recipe.quantize is not None
    try:
        with ui.progress(recipe.quantize.method) as step:
            report = quantize(made, step)
    except KeyboardInterrupt:
        ui.note("stopped; the same command goes on where it was")
        raise
    _show_report(report.as_dict(), how.as_json)


def _show_plan(plan: dict[str, Any], as_json: bool) -> None:
    """Print what would be done."""
    if as_json:
        ui.emit(plan)
        return
    ui.say(f"{plan['model']} · {plan['blocks']} blocks · {ui.size(plan['source_bytes'])}")
    sizes.show(plan["groups"])
    smaller = plan["source_bytes"] / plan["output_bytes"]
    ui.say(
        f"output {ui.size(plan['output_bytes'])} ({smaller:.1f}x smaller) · "
        f"peak memory about {ui.size(plan['peak_bytes'])} · disk {ui.size(plan['disk_bytes'])}"
    )
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
        ui.size(report["output_bytes"]),
        f"{report['bits_per_weight']:.2f} bits/weight",
        ui.seconds(report["seconds"]),
    ]
    ui.done(" · ".join(facts), following=f"optim run {report['output']}")
