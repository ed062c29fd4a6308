"""The commands that look at models and measure them.

Each reads its flags and calls one function of `cli/`.
"""

import typer

from optim.cli import flags

app = typer.Typer()


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
    speculate: flags.Speculate = "off",
    draft: flags.Draft = None,
    device: flags.Device = "auto",
    threads: flags.Threads = None,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
) -> None:
    """Measure speed and memory, against the original and other engines.

    With --speculate or --draft: what guessing ahead gains, over prompts of our own.
    """
    from optim.cli import bench as command
    from optim.cli import bench_speculation

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
        speculate,
        draft,
    )
    guessing = draft is not None or speculate != "off"
    run = bench_speculation.bench if guessing else command.bench
    run(model, asked, as_json=json, quiet=quiet)


@app.command(rich_help_panel="Look", epilog="Example: optim doctor --json")
def doctor(json: flags.Json = False, levels: flags.Levels = False) -> None:
    """Show what this machine can run, and test each kernel on it."""
    from optim.cli import doctor as command

    command.doctor(as_json=json, levels=levels)


@app.command(rich_help_panel="Look", epilog="Example: optim verify smollm2-awq --against demo")
def verify(
    model: flags.Model,
    against: flags.Against = None,
    device: flags.Device = "auto",
    threads: flags.Threads = None,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
) -> None:
    """Measure every number of an artifact again; exit 3 if one does not hold."""
    from optim.cli import verify as command

    command.verify(model, against, device, threads, as_json=json, quiet=quiet)


@app.command(
    rich_help_panel="Look",
    epilog="Example: optim compare demo smollm2-awq smollm2-w3 --plot it.png",
)
def compare(
    models: flags.Models,
    against: flags.Against = None,
    text: flags.Text = "builtin:eval",
    window: flags.Window = 512,
    max_windows: flags.FewWindows = 4,
    no_speed: flags.NoSpeed = False,
    plot: flags.Plot = None,
    device: flags.Device = "auto",
    threads: flags.Threads = None,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
) -> None:
    """Put models side by side: size, bits, perplexity, divergence from the first, speed."""
    from optim.cli import compare as command

    asked = command.Asked(text, window, max_windows, not no_speed, device, threads)
    command.compare(models, against, asked, plot, as_json=json, quiet=quiet)
