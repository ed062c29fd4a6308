"""The commands for recipes. Each reads its flags and calls one function of `cli/`."""

from typing import Annotated

import typer

from optim.cli import flags

app = typer.Typer(
    help="List, show and check recipes.",
    epilog="Example: optim recipe show awq-w4 > my.yaml",
    no_args_is_help=True,
)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A file or a built-in name.")]


@app.command("list", epilog="Example: optim recipe list")
def recipe_list(json: flags.Json = False) -> None:
    """List the built-in recipes."""
    from optim.cli import recipe as command

    command.list_recipes(as_json=json)


@app.command("show", epilog="Example: optim recipe show awq-w4 > my.yaml")
def recipe_show(recipe: RecipeName, json: flags.Json = False) -> None:
    """Print a recipe's file; with --json all of its values, the defaults included."""
    from optim.cli import recipe as command

    command.show_recipe(recipe, as_json=json)


@app.command("check", epilog="Example: optim recipe check my.yaml")
def recipe_check(recipe: RecipeName, json: flags.Json = False) -> None:
    """Check a recipe: all its problems at once, each with its line."""
    from optim.cli import recipe as command

    command.check_recipe(recipe, as_json=json)


@app.command("schema", epilog="Example: optim recipe schema > optim-recipe.schema.json")
def recipe_schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from optim.cli import recipe as command

    command.print_schema()
