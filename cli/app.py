"""The program: its options, and the panels of commands in the order that `--help` has them.

Nothing heavy is imported here, so that `optim --help` answers at once.
"""

from importlib.metadata import version
from typing import Annotated

import typer

from optim.cli.commands import compress, hub, look, recipe, use

app = typer.Typer(
    name="optim",
    help="Make a language model smaller, prove what it cost, and run it.",
    epilog="Example: optim quantize demo -o smollm2-awq && optim run smollm2-awq",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
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


for panel in (compress, use, look, hub):
    app.add_typer(panel.app)
app.add_typer(recipe.app, name="recipe", rich_help_panel="Recipes")
