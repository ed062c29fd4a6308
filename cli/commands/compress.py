"""The commands that make artifacts. Each reads its flags and calls one function of `cli/`."""

from typing import Any

import typer

from optim.cli import flags
from optim.cli.recipe_flags import with_keys

app = typer.Typer()


@app.command(
    rich_help_panel="Compress",
    epilog="Example: optim quantize demo -m awq --bits 4 --group-size 64 -o smollm2-awq",
)
@with_keys("quantize")
def quantize(
    model: flags.RecipeModel = None,
    output: flags.QuantizeOutput = None,
    recipe: flags.Recipe = None,
    sets: flags.Sets = None,
    print_recipe: flags.PrintRecipe = False,
    dry_run: flags.DryRun = False,
    no_eval: flags.NoEval = False,
    force: flags.Force = False,
    device: flags.Device = "auto",
    threads: flags.Threads = None,
    trust_remote_code: flags.TrustCode = False,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    **keys: Any,
) -> None:
    """Store weights in 2, 3, 4 or 8 bits, guided by text or not; mergequant: activations too."""
    from optim.cli import quantize as command
    from optim.cli.compress import How

    keys |= {"model": model, "output": output}
    work = (print_recipe, dry_run, not no_eval)
    how = How(device, threads, trust_remote_code, force, json, quiet, *work)
    command.quantize(recipe, keys, sets or [], how)


@app.command(
    rich_help_panel="Compress",
    epilog="Example: optim prune demo --sparsity 0.25 -o smollm2-sparse",
)
@with_keys("prune")
def prune(
    model: flags.RecipeModel = None,
    output: flags.PruneOutput = None,
    recipe: flags.Recipe = None,
    sets: flags.Sets = None,
    print_recipe: flags.PrintRecipe = False,
    dry_run: flags.DryRun = False,
    no_eval: flags.NoEval = False,
    force: flags.Force = False,
    device: flags.Device = "auto",
    threads: flags.Threads = None,
    trust_remote_code: flags.TrustCode = False,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    **keys: Any,
) -> None:
    """Leave out what hardly matters as the model runs: small inputs, idle neurons, zeros."""
    from optim.cli import prune as command
    from optim.cli.compress import How

    keys |= {"model": model, "output": output}
    work = (print_recipe, dry_run, not no_eval)
    how = How(device, threads, trust_remote_code, force, json, quiet, *work)
    command.prune(recipe, keys, sets or [], how)


@app.command(rich_help_panel="Compress", epilog="Example: optim pack demo -o smollm2-df11")
@with_keys("pack")
def pack(
    model: flags.RecipeModel = None,
    output: flags.PackOutput = None,
    recipe: flags.Recipe = None,
    print_recipe: flags.PrintRecipe = False,
    dry_run: flags.DryRun = False,
    no_eval: flags.NoEval = False,
    force: flags.Force = False,
    threads: flags.Threads = None,
    trust_remote_code: flags.TrustCode = False,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    **keys: Any,
) -> None:
    """Store bf16 weights in 11 or 12 bits without any loss, and prove it."""
    from optim.cli import pack as command
    from optim.cli.compress import How

    keys |= {"model": model, "output": output}
    work = (print_recipe, dry_run, not no_eval)
    how = How("cpu", threads, trust_remote_code, force, json, quiet, *work)
    command.pack(recipe, keys, how)


@app.command(
    rich_help_panel="Compress", epilog="Example: optim unpack smollm2-df11 -o smollm2-original"
)
def unpack(
    model: flags.Packed,
    output: flags.UnpackOutput = None,
    force: flags.Force = False,
    threads: flags.Threads = None,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
) -> None:
    """Write the tensors that were packed, byte for byte."""
    from optim.cli import pack as command
    from optim.cli.compress import How

    how = How("cpu", threads, force=force, as_json=json, quiet=quiet)
    command.unpack(model, output, how)


@app.command(
    rich_help_panel="Compress",
    epilog="Example: optim export smollm2-awq --format gguf -o smollm2.gguf",
)
@with_keys("export")
def export(
    model: flags.RecipeModel = None,
    output: flags.ExportOutput = None,
    recipe: flags.Recipe = None,
    print_recipe: flags.PrintRecipe = False,
    dry_run: flags.DryRun = False,
    no_eval: flags.NoEval = False,
    force: flags.Force = False,
    threads: flags.Threads = None,
    trust_remote_code: flags.TrustCode = False,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    **keys: Any,
) -> None:
    """Write the model in the form of another program, integers as they are where it has them."""
    from optim.cli import export as command
    from optim.cli.compress import How

    keys |= {"model": model, "output": output}
    work = (print_recipe, dry_run, not no_eval)
    how = How("cpu", threads, trust_remote_code, force, json, quiet, *work)
    command.export(recipe, keys, how)


@app.command(rich_help_panel="Compress", epilog="Example: optim apply everything demo -o smollm2")
def apply(
    recipe: flags.Applied,
    model: flags.RecipeModel = None,
    output: flags.ApplyOutput = None,
    sets: flags.Sets = None,
    keep_steps: flags.KeepSteps = False,
    print_recipe: flags.PrintRecipe = False,
    dry_run: flags.DryRun = False,
    no_eval: flags.NoEval = False,
    force: flags.Force = False,
    device: flags.Device = "auto",
    threads: flags.Threads = None,
    trust_remote_code: flags.TrustCode = False,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
) -> None:
    """Carry out all sections of a recipe: quantize, prune, pack, and an export beside it."""
    from optim.cli.apply import command
    from optim.cli.compress import How

    keys = {"model": model, "output": output}
    work = (print_recipe, dry_run, not no_eval)
    how = How(device, threads, trust_remote_code, force, json, quiet, *work)
    command.apply(recipe, keys, sets or [], how, keep_steps)


@app.command(
    rich_help_panel="Compress",
    epilog="Example: optim tune smollm2-awq --against demo -o smollm2-tuned",
)
def tune(
    artifact: flags.Tunable,
    against: flags.Original,
    output: flags.TuneOutput = None,
    epochs: flags.Epochs = 3,
    lr: flags.Rate = 1e-3,
    calibration: flags.TuneText = "builtin:mixed",
    num_samples: flags.TuneSamples = 64,
    seq_len: flags.TuneLength = 512,
    seed: flags.TuneSeed = 0,
    no_eval: flags.NoEval = False,
    force: flags.Force = False,
    device: flags.Device = "auto",
    threads: flags.Threads = None,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
) -> None:
    """Train the scales and norms of a packed model towards the original; its format stays."""
    from optim.cli import tune as command
    from optim.cli.compress import How

    names = ("dataset", "num_samples", "seq_len", "seed")
    text = dict(zip(names, (calibration, num_samples, seq_len, seed), strict=True))
    how = How(device, threads, force=force, as_json=json, quiet=quiet, evaluate=not no_eval)
    command.tune(artifact, against, output, text, command.Training(epochs, lr), how)
