"""The commands: each reads its flags and calls one function of `cli/<command>.py`.

Nothing heavy is imported here, so that `optim --help` answers at once.
"""

from importlib.metadata import version
from typing import Annotated, Any

import typer

from optim.cli import flags
from optim.cli.recipe_flags import with_keys

app = typer.Typer(
    name="optim",
    help="Make a language model smaller, prove what it cost, and run it.",
    epilog="Example: optim quantize demo -o smollm2-awq && optim run smollm2-awq",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes = typer.Typer(
    help="List, show and check recipes.",
    epilog="Example: optim recipe show awq-w4 > my.yaml",
    no_args_is_help=True,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"optim {version('optim-llm')}")
        raise typer.Exit


@app.callback()
def _options(
    _show: Annotated[
        bool,
        typer.Option("-V", "--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


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
    how = How(device, threads, trust_remote_code, force, json, quiet, print_recipe, dry_run)
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
    how = How(device, threads, trust_remote_code, force, json, quiet, print_recipe, dry_run)
    command.prune(recipe, keys, sets or [], how)


@app.command(rich_help_panel="Compress", epilog="Example: optim pack demo -o smollm2-df11")
@with_keys("pack")
def pack(
    model: flags.RecipeModel = None,
    output: flags.PackOutput = None,
    recipe: flags.Recipe = None,
    print_recipe: flags.PrintRecipe = False,
    dry_run: flags.DryRun = False,
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
    how = How("cpu", threads, trust_remote_code, force, json, quiet, print_recipe, dry_run)
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
    rich_help_panel="Run", epilog='Example: optim run smollm2-awq "What is the capital of France?"'
)
def run(
    model: flags.Model,
    prompt: flags.Prompt = None,
    system: flags.System = "",
    raw: flags.Raw = False,
    chat: flags.Chat = False,
    quiet: flags.Quiet = False,
    stats: flags.Stats = False,
    batch: flags.BatchFile = None,
    batch_size: flags.BatchSize = 8,
    output: flags.Rows = None,
    context: flags.Context = None,
    kv_bits: flags.KvBits = 16,
    kv_policy: flags.KvPolicy = "full",
    exact: flags.Exact = False,
    offload: flags.Offload = False,
    device: flags.Device = "auto",
    threads: flags.Threads = None,
    json: flags.Json = False,
    temperature: flags.Temperature = None,
    top_k: flags.TopK = None,
    top_p: flags.TopP = None,
    min_p: flags.MinP = None,
    repetition_penalty: flags.RepetitionPenalty = None,
    seed: flags.SampleSeed = None,
    max_tokens: flags.MaxTokens = None,
    stop: flags.Stop = None,
) -> None:
    """Chat with a model, answer one prompt, or a file of them."""
    from optim.cli import run as command

    sampling = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "max_tokens": max_tokens,
        "stop": tuple(stop) if stop else None,
    }
    given = {key: value for key, value in sampling.items() if value is not None}
    options = command.RunOptions(
        *(system, raw, quiet, chat, stats, json, context, kv_bits, kv_policy, threads, device),
        *(exact, offload, given),
    )
    if batch is None:
        raise typer.Exit(command.run(model, prompt, options))
    raise typer.Exit(command.run_file(model, batch, prompt, options, output, batch_size))


@app.command(rich_help_panel="Look", epilog="Example: optim inspect smollm2-awq --verify")
def inspect(
    model: flags.Model,
    verify: flags.Verify = False,
    tensors: flags.Tensors = False,
    json: flags.Json = False,
) -> None:
    """Show where the bytes are, and how an artifact was made, without loading it."""
    from optim.cli import inspect as command

    command.inspect(model, verify=verify, as_json=json, tensors=tensors)


@app.command(
    "eval", rich_help_panel="Look", epilog="Example: optim eval smollm2-awq --against demo"
)
def evaluate(
    model: flags.Model,
    against: flags.Against = None,
    text: flags.Text = "builtin:eval",
    text_column: flags.TextColumn = "text",
    window: flags.Window = 1024,
    max_windows: flags.MaxWindows = None,
    max_ppl_increase: flags.MaxIncrease = None,
    record: flags.Record = False,
    device: flags.Device = "auto",
    threads: flags.Threads = None,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
) -> None:
    """Measure perplexity, and the divergence from the original model."""
    from optim.cli import evaluate as command

    asked = command.Asked(against, text, text_column, window, max_windows, device, threads)
    what = command.Then(max_ppl_increase, record, json, quiet)
    command.evaluate(model, asked, what)


@app.command(
    rich_help_panel="Look", epilog="Example: optim bench smollm2-awq --against demo --threads 2"
)
def bench(
    model: flags.Model,
    against: flags.Against = None,
    peer: flags.Peer = None,
    prompt_tokens: flags.PromptTokens = "64,512",
    new_tokens: flags.NewTokens = 64,
    batch: flags.Batch = 1,
    repeat: flags.Repeat = 3,
    context: flags.Context = None,
    kv_bits: flags.KvBits = 16,
    kv_policy: flags.KvPolicy = "full",
    exact: flags.Exact = False,
    offload: flags.Offload = False,
    device: flags.Device = "auto",
    threads: flags.Threads = None,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
) -> None:
    """Measure speed and memory, against the original and other engines."""
    from optim.cli import bench as command

    asked = command.Asked(
        against,
        tuple(peer or ()),
        prompt_tokens,
        new_tokens,
        batch,
        repeat,
        threads,
        device,
        kv_bits,
        kv_policy,
        context,
        exact,
        offload,
    )
    command.bench(model, asked, as_json=json, quiet=quiet)


@app.command(rich_help_panel="Look", epilog="Example: optim doctor --json")
def doctor(json: flags.Json = False, levels: flags.Levels = False) -> None:
    """Show what this machine can run, and test each kernel on it."""
    from optim.cli import doctor as command

    command.doctor(as_json=json, levels=levels)


CachedModel = Annotated[
    str, typer.Argument(metavar="MODEL", help="A hub id, owner/name or owner/name@revision; demo.")
]


@app.command("list", rich_help_panel="Models", epilog="Example: optim list")
def list_models(json: flags.Json = False) -> None:
    """List the models that were fetched."""
    from optim.cli import models as command

    command.list_models(as_json=json)


@app.command(rich_help_panel="Models", epilog="Example: optim pull demo")
def pull(model: CachedModel, revision: flags.Revision = None, quiet: flags.Quiet = False) -> None:
    """Fetch a model. HF_ENDPOINT names another hub, HF_TOKEN opens private models."""
    from optim.cli import models as command

    command.pull(model, revision, quiet=quiet)


@app.command(rich_help_panel="Models", epilog="Example: optim rm demo")
def rm(model: CachedModel, json: flags.Json = False) -> None:
    """Remove a fetched model from the cache."""
    from optim.cli import models as command

    command.remove(model, as_json=json)


app.add_typer(recipes, name="recipe", rich_help_panel="Recipes")

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A file or a built-in name.")]


@recipes.command("list", epilog="Example: optim recipe list")
def recipe_list(json: flags.Json = False) -> None:
    """List the built-in recipes."""
    from optim.cli import recipe as command

    command.list_recipes(as_json=json)


@recipes.command("show", epilog="Example: optim recipe show awq-w4 > my.yaml")
def recipe_show(recipe: RecipeName, json: flags.Json = False) -> None:
    """Print a recipe's file; with --json all of its values, the defaults included."""
    from optim.cli import recipe as command

    command.show_recipe(recipe, as_json=json)


@recipes.command("check", epilog="Example: optim recipe check my.yaml")
def recipe_check(recipe: RecipeName, json: flags.Json = False) -> None:
    """Check a recipe: all its problems at once, each with its line."""
    from optim.cli import recipe as command

    command.check_recipe(recipe, as_json=json)


@recipes.command("schema", epilog="Example: optim recipe schema > optim-recipe.schema.json")
def recipe_schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from optim.cli import recipe as command

    command.print_schema()
