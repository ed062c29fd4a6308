"""`optim recipe`: the built-in recipes, and a check for one's own."""

from optim.cli import ui
from optim.recipes.build import build_recipe, builtin, recipe_text
from optim.recipes.problems import RecipeError
from optim.recipes.schema import json_schema


def list_recipes(as_json: bool) -> None:
    """Names and purposes of the built-in recipes."""
    found = builtin()
    if as_json:
        ui.emit([{"name": name, "about": about} for name, about in found.items()])
    else:
        ui.table(("recipe", "about"), found.items(), left=2)


def show_recipe(file_or_name: str, as_json: bool) -> None:
    """The file as it is, or the checked recipe with its defaults as JSON."""
    if as_json:
        ui.emit(build_recipe(file_or_name).model_dump(mode="json"))
    else:
        ui.say(recipe_text(file_or_name).rstrip("\n"))


def check_recipe(file_or_name: str, as_json: bool) -> None:
    """Say that a recipe is valid, or raise RecipeError with all its problems."""
    try:
        build_recipe(file_or_name)
    except RecipeError as error:
        if as_json:
            ui.emit({"valid": False, "problems": error.problems})
        raise
    if as_json:
        ui.emit({"valid": True, "problems": []})
    else:
        ui.say(f"{file_or_name} is a valid recipe")


def print_schema() -> None:
    """The JSON schema."""
    ui.emit(json_schema())
