"""A recipe with the sections quantize and pack: the two commands in turn, one folder in the end.

The first makes OUTPUT.quantized, which a run that was stopped finds again; the second packs what
the first left in bf16, and takes over what its manifest says.
"""

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from optim.cli import ui
from optim.cli.compress import How, carry_out, only_planned
from optim.recipes.schema import Recipe

if TYPE_CHECKING:
    from optim.export.lossless.pack import Report
    from optim.quant.plan import Plan
    from optim.runtime.storage.workspace import Prove

BETWEEN = ".quantized"  # behind the output's name: what the first command makes for the second


def quantize_and_pack(recipe: Recipe, how: How) -> None:
    """Plan both, and do both unless it is a dry run. Raises OptimError as either command does."""
    from optim.export.lossless import plan as packing
    from optim.quant.run import plan, quantize
    from optim.runtime.system.output import refusal

    assert recipe.quantize is not None and recipe.pack is not None
    alone = recipe.model_copy(update={"pack": None})
    named = "" if recipe.output else f"-{recipe.pack.layout}"
    made = plan(alone, **replace(how, force=True).given, suffix=named + BETWEEN)
    made = replace(made, force=how.force)
    problem = None if _is_there(made) else refusal(made.output, how.force)
    if problem is not None:
        raise problem
    output = made.output.with_name(made.output.name.removesuffix(BETWEEN))
    # What packing would refuse is refused before hours of quantization.
    packing.plan(made.checkpoint, recipe.pack, str(output), force=how.force)
    after = f"then what stays bf16 is packed without loss ({recipe.pack.layout})"
    facts = made.as_dict() | {"output": str(output), "notes": [*made.as_dict()["notes"], after]}
    if how.dry_run:
        made.check_text()
    if only_planned(facts, how, _show_plan):
        return

    def work(step: ui.Step, /, *, prove: "Prove | None") -> "Report":
        if not _is_there(made):
            quantize(made, step)
        assert recipe.pack is not None
        second = packing.plan(str(made.output), recipe.pack, str(output), force=how.force)
        from optim.export.lossless.pack import pack

        report = pack(second, step, prove)
        shutil.rmtree(made.output)
        return report

    carry_out(f"{recipe.quantize.method}, pack", work, how, _facts, against=recipe.model)


def _is_there(made: "Plan") -> bool:
    """Whether an earlier run of the same recipe on the same model has quantized already."""
    from optim.runtime.storage.manifest import read_manifest

    found = read_manifest(made.output) if made.output.is_dir() else None
    wanted = made.recipe.model_dump(mode="json", exclude={"output"})
    source = made.checkpoint.fingerprint()
    if found is None or found.source is None:
        return False
    return found.recipe == wanted and found.source.sha256 == source


def _show_plan(plan: dict[str, Any]) -> None:
    ui.say(f"{plan['model']} · {plan['blocks']} blocks · {ui.size(plan['source_bytes'])}")
    ui.size_table(plan["groups"])


def _facts(report: dict[str, Any]) -> list[str]:
    return [
        ui.size(report["output_bytes"]),
        f"{report['packed_weights']:,} bf16 weights in {report['packed_bits_per_weight']:.3f} bits,"
        " each decoded again and proven equal",
        ui.seconds(report["seconds"]),
    ]
