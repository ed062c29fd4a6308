"""The commands for models of the hub. Each reads its flags and calls one function of `cli/`."""

from typing import Annotated

import typer

from optim.cli import flags
from optim.cli.defaults import model as named

app = typer.Typer()

CachedModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        callback=named,
        help="A hub id, owner/name or owner/name@revision; demo.",
    ),
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


@app.command(rich_help_panel="Models", epilog="Example: optim push smollm2-awq me/smollm2-awq")
def push(
    artifact: flags.Pushed, repo: flags.Repo, yes: flags.Yes = False, quiet: flags.Quiet = False
) -> None:
    """Send a finished artifact, or a GGUF file, to a repository of the hub; asks first."""
    from optim.cli import push as command

    command.push(artifact, repo, yes=yes, quiet=quiet)
