"""The commands that make artifacts. Each reads its flags and calls one function of `cli/`."""

from typing import Any

import typer

from optim.cli import flags
from optim.cli.options import How, Planning, Tuning
from optim.cli.recipe_flags import with_keys
from optim.cli.spread import spread

app = typer.Typer()


@app.command(
    rich_help_panel="Compress",
    epilog="Example: optim quantize demo -m awq --bits 4 --group-size 64 -o smollm2-awq",
)
@with_keys("quantize")
@spread()
def quantize(
    model: flags.RecipeModel = None,
    output: flags.QuantizeOutput = None,
    recipe: flags.Recipe = None,
    sets: flags.Sets = None,
    *,
    how: How,
    **keys: Any,
) -> None:
    """Store weights in 2, 3, 4 or 8 bits, guided by text or not; mergequant: activations too."""
    from optim.cli import quantize as command

    keys |= {"model": model, "output": output}
    command.quantize(recipe, keys, sets or [], how)


@app.command(
    rich_help_panel="Compress",
    epilog="Example: optim prune demo --sparsity 0.25 -o smollm2-sparse",
)
@with_keys("prune")
@spread()
def prune(
    model: flags.RecipeModel = None,
    output: flags.PruneOutput = None,
    recipe: flags.Recipe = None,
    sets: flags.Sets = None,
    *,
    how: How,
    **keys: Any,
) -> None:
    """Leave out what hardly matters as the model runs: small inputs, idle neurons, zeros."""
    from optim.cli import prune as command

    keys |= {"model": model, "output": output}
    command.prune(recipe, keys, sets or [], how)


@app.command(rich_help_panel="Compress", epilog="Example: optim pack demo -o smollm2-df11")
@with_keys("pack")
@spread(device="cpu")
def pack(
    model: flags.RecipeModel = None,
    output: flags.PackOutput = None,
    recipe: flags.Recipe = None,
    *,
    how: How,
    **keys: Any,
) -> None:
    """Store bf16 weights in 11 or 12 bits without any loss, and prove it."""
    from optim.cli import pack as command

    keys |= {"model": model, "output": output}
    command.pack(recipe, keys, how)


@app.command(
    rich_help_panel="Compress", epilog="Example: optim unpack smollm2-df11 -o smollm2-original"
)
@spread(
    device="cpu",
    trust_remote_code=False,
    print_recipe=False,
    dry_run=False,
    no_eval=True,
    push=None,
    yes=True,
)
def unpack(model: flags.Packed, output: flags.UnpackOutput = None, *, how: How) -> None:
    """Write the tensors that were packed, byte for byte."""
    from optim.cli import pack as command

    command.unpack(model, output, how)


@app.command(
    rich_help_panel="Compress",
    epilog="Example: optim export smollm2-awq --format gguf -o smollm2.gguf",
)
@with_keys("export")
@spread(device="cpu")
def export(
    model: flags.RecipeModel = None,
    output: flags.ExportOutput = None,
    recipe: flags.Recipe = None,
    *,
    how: How,
    **keys: Any,
) -> None:
    """Write the model in the form of another program, integers as they are where it has them."""
    from optim.cli import export as command

    keys |= {"model": model, "output": output}
    command.export(recipe, keys, how)


@app.command(rich_help_panel="Compress", epilog="Example: optim apply everything demo -o smollm2")
@spread()
def apply(
    recipe: flags.Applied,
    model: flags.RecipeModel = None,
    output: flags.ApplyOutput = None,
    sets: flags.Sets = None,
    keep_steps: flags.KeepSteps = False,
    *,
    how: How,
) -> None:
    """Carry out all sections of a recipe: quantize, prune, pack, and an export beside it."""
    from optim.cli.apply import command

    keys = {"model": model, "output": output}
    command.apply(recipe, keys, sets or [], how, keep_steps)


@app.command(rich_help_panel="Compress", epilog="Example: optim plan demo --bits 3.5 -o small.yaml")
@spread()
def plan(model: flags.Model, output: flags.PlanOutput = None, *, asked: Planning) -> None:
    """Choose a width for each linear so that the model fits a budget; writes a recipe."""
    from optim.cli import plan as command

    command.plan(model, output, asked)


@app.command(
    rich_help_panel="Compress",
    epilog="Example: optim tune smollm2-awq --against demo -o smollm2-tuned",
)
@spread(trust_remote_code=False, print_recipe=False, dry_run=False)
def tune(
    artifact: flags.Tunable,
    against: flags.Original,
    output: flags.TuneOutput = None,
    *,
    tuning: Tuning,
    how: How,
) -> None:
    """Train the scales and norms of a packed model towards the original; its format stays."""
    from optim.cli import tune as command

    command.tune(artifact, against, output, tuning, how)
