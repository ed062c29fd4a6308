"""The program: its options, and the panels of commands in the order that `--help` has them.

Nothing heavy is imported here, so that `optim --help` answers at once.
"""

from importlib.metadata import version
from typing import Annotated

import typer

from optim.cli.commands import hub, look, use

LIGHT = (use, look, hub)
VERSION = ("-V", "--version")


def program(first: str = "") -> typer.Typer:
    """The program; `first` is the first word that was typed.

    Reading the schema of recipes takes a tenth of a second: where another command is asked for,
    those that have recipes are left out.
    """
    app = typer.Typer(
        name="optim",
        help="Make a language model smaller, prove what it cost, and run it.",
        epilog="Example: optim quantize demo -o smollm2-awq && optim run smollm2-awq",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    known = {typed for panel in LIGHT for typed in _typed(panel.app)}
    if first in known or first in VERSION:
        for light in LIGHT:
            app.add_typer(light.app)
        return app
    from optim.cli.commands import compress, recipe

    for panel in (compress, *LIGHT):
        app.add_typer(panel.app)
    app.add_typer(recipe.app, name="recipe", rich_help_panel="Recipes")
    return app


def _typed(panel: typer.Typer) -> list[str | None]:
    """The commands of a panel as they are typed."""
    return [
        made.name or getattr(made.callback, "__name__", None) for made in panel.registered_commands
    ]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"optim {version('optim-llm')}")
        raise typer.Exit


def _options(
    _show: Annotated[
        bool,
        typer.Option(*VERSION, callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass
