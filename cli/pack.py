"""`optim pack` and `optim unpack`: bf16 weights in fewer bytes without loss, and back."""

import shlex
from functools import partial
from typing import Any

from optim.cli import ui
from optim.cli.apply.several import several
from optim.cli.compress import GOES_ON, carry_out, only_planned, recipe_of
from optim.cli.options import How
from optim.recipes.errors import USAGE, OptimError
from optim.recipes.meetings import sections
from optim.recipes.schema import Recipe


def pack(file_or_name: str | None, keys: dict[str, Any], how: How) -> None:
    """Build the recipe of the command line, and print it, plan it or do it."""
    if keys.get("pack.layout") is None and not file_or_name:
        keys = keys | {"pack.layout": "df11"}
    recipe = recipe_of("pack", file_or_name, keys, [], how)
    if recipe is None:
        return
    if len(sections(recipe)) > 1:
        return several(recipe, file_or_name, how)
    work(recipe, how)


def work(recipe: Recipe, how: How) -> None:
    """The plan, and the work unless it is a dry run."""
    assert recipe.model is not None and recipe.pack is not None
    from optim.export.lossless.pack import pack
    from optim.export.lossless.plan import plan

    _use_threads(how.threads)
    trust = how.trust_remote_code
    made = plan(recipe.model, recipe.pack, recipe.output, force=how.force, trust_remote_code=trust)
    if not only_planned(made.as_dict(), how, _show_plan):
        rounded = recipe.model if recipe.pack.cast else None
        carry_out("pack", partial(pack, made), how, _facts, against=rounded)


def unpack(model: str, output: str | None, how: How) -> None:
    """Write the original tensors of a packed folder."""
    if output is None:
        raise OptimError("no output folder is given", "-o/--output FOLDER", USAGE)
    ui.notes.quiet = how.quiet
    from optim.export.lossless.unpack import unpack

    _use_threads(how.threads)
    try:
        with ui.progress("unpack") as step:
            made = unpack(model, output, step, force=how.force).as_dict()
    except KeyboardInterrupt:
        ui.note(f"stopped; {GOES_ON}")
        raise
    if how.json:
        ui.emit(made)
    rate = made["bytes"] / max(made["seconds"], 1e-9) / 1e9
    proof = f"{made['proven']} of {made['tensors']} tensors proven by their sha256"
    facts = [output, ui.size(made["bytes"]), proof, ui.seconds(made["seconds"])]
    ui.done(
        " · ".join([*facts, f"{rate:.2f} GB/s"]), following=shlex.join(["optim", "inspect", output])
    )


def _use_threads(threads: int | None) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)


def _show_plan(plan: dict[str, Any]) -> None:
    units = sum(len(shard["units"]) for shard in plan["shards"])
    share = plan["output_bytes"] / plan["source_bytes"]
    ui.say(f"{plan['model']} · {ui.size(plan['source_bytes'])} · layout {plan['layout']}")
    ui.say(
        f"{ui.count(plan['packed_weights'])} weights in {units} units, "
        f"{ui.size(plan['raw_bytes'])} as they are, {len(plan['shards'])} files"
    )
    ui.say(f"output about {ui.size(plan['output_bytes'])} ({share:.0%})")


def _facts(report: dict[str, Any]) -> list[str]:
    rate = report["source_bytes"] / max(report["seconds"], 1e-9) / 1e9
    return [
        f"{report['packed_bits_per_weight']:.3f} bits/weight"
        f" (limit {report['limit_bits_per_weight']:.3f})",
        f"{report['packed_weights']:,} weights, each decoded again and proven equal",
        ui.seconds(report["seconds"]),
        f"{rate:.2f} GB/s",
    ]
