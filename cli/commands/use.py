"""The commands that run a model. Each reads its flags and calls one function of `cli/`."""

import typer

from optim.cli import flags
from optim.cli.options import Asking, Drawing, Rows, Running, Serving
from optim.cli.spread import spread

app = typer.Typer()


@app.command(
    rich_help_panel="Run", epilog='Example: optim run smollm2-awq "What is the capital of France?"'
)
@spread()
def run(
    model: flags.Model,
    prompt: flags.Prompt = None,
    *,
    rows: Rows,
    asking: Asking,
    drawing: Drawing,
) -> None:
    """Chat with a model, answer one prompt, or a file of them."""
    from optim.cli import run as command

    if rows.batch is None:
        raise typer.Exit(command.run(model, prompt, asking, drawing))
    raise typer.Exit(command.run_file(model, prompt, rows, asking, drawing))


@app.command(rich_help_panel="Run", epilog="Example: optim serve smollm2-awq --port 8080")
@spread(kv_policy="full", offload=False, draft=None)
def serve(model: flags.Model, *, serving: Serving, running: Running) -> None:
    """Answer OpenAI's API, and show a chat page, for other programs and people."""
    from optim.cli.serve import command

    raise typer.Exit(command.serve(model, serving, running))
