"""The commands that look at models and measure them.

Each reads its flags and calls one function of `cli/`.
"""

import typer

from optim.cli import flags
from optim.cli.options import Common, Comparing, Evaluating, Timing
from optim.cli.spread import spread

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
@spread()
def evaluate(model: flags.Model, *, asked: Evaluating) -> None:
    """Measure perplexity and the divergence from the original model, or ask tasks of lm-eval."""
    if asked.tasks is not None:
        from optim.cli.tasks import tasks

        return tasks(model, asked.tasks, asked)
    from optim.cli import evaluate as command

    command.evaluate(model, asked)


@app.command(
    rich_help_panel="Look", epilog="Example: optim bench smollm2-awq --against demo --threads 2"
)
@spread()
def bench(model: flags.Model, *, asked: Timing) -> None:
    """Measure speed and memory, against the original and other engines.

    With --speculate or --draft: what guessing ahead gains, over prompts of our own. With --serve:
    throughput and latency of a server with many clients.
    """
    from optim.cli import bench as command
    from optim.cli import bench_serve, bench_speculation

    guessing = asked.draft is not None or asked.speculate != "off"
    run = bench_speculation.bench if guessing else command.bench
    (bench_serve.bench if asked.serve else run)(model, asked)


@app.command(rich_help_panel="Look", epilog="Example: optim doctor --json")
def doctor(json: flags.Json = False, levels: flags.Levels = False) -> None:
    """Show what this machine can run, and test each kernel on it."""
    from optim.cli import doctor as command

    command.doctor(as_json=json, levels=levels)


@app.command(rich_help_panel="Look", epilog="Example: optim verify smollm2-awq --against demo")
@spread()
def verify(model: flags.Model, against: flags.Against = None, *, common: Common) -> None:
    """Measure every number of an artifact again; exit 3 if one does not hold."""
    from optim.cli import verify as command

    command.verify(model, against, common)


@app.command(
    rich_help_panel="Look",
    epilog="Example: optim compare demo smollm2-awq smollm2-w3 --plot it.png",
)
@spread()
def compare(models: flags.Models, *, asked: Comparing) -> None:
    """Put models side by side: size, bits, perplexity, divergence from the first, speed."""
    from optim.cli import compare as command

    command.compare(models, asked)
