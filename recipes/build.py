"""One way to a recipe: a file or a built-in one, then the flags, then `--set`, then the check."""

from importlib.resources import files
from pathlib import Path as FilePath
from typing import Any

import yaml
from pydantic import ValidationError

from optim.recipes.errors import USAGE, OptimError
from optim.recipes.idle import idle
from optim.recipes.keys import flag_of
from optim.recipes.problems import Path, Place, Problem, RecipeError, did_you_mean, explain
from optim.recipes.schema import VERSION, Recipe
from optim.recipes.yaml_source import decode, parse_mapping, parse_value

_AFTER_ALL_LINES = 10**9
_TYPED = {"model": "MODEL", "output": "--output"}  # the keys that stand in no section


def builtin() -> dict[str, str]:
    """The built-in recipes: name to the line that says what it is for."""
    folder = files("optim.recipes")
    found = sorted(item.name for item in folder.iterdir() if item.name.endswith(".yaml"))
    return {name.removesuffix(".yaml"): _summary((folder / name).read_text()) for name in found}


def recipe_text(file_or_name: str) -> str:
    """The YAML of a built-in recipe or of a file; OptimError (2) if there is none."""
    if file_or_name in builtin():
        return (files("optim.recipes") / f"{file_or_name}.yaml").read_text()
    path = FilePath(file_or_name).expanduser()
    try:
        with path.open("rb") as file:
            return decode(file.read(1 << 20), file_or_name)
    except FileNotFoundError:
        raise _unknown_recipe(file_or_name) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OptimError(f"cannot read {file_or_name}: {reason}", code=USAGE) from None


def build_recipe(
    file_or_name: str | None = None,
    flags: dict[str, Any] | None = None,
    sets: list[str] | None = None,
) -> Recipe:
    """The checked recipe of a command line.

    `flags` maps dotted keys to values ("quantize.bits": 3); None means that the flag was not
    given. `sets` are `key=value` texts. Both go over what the file says, `sets` last.
    Raises OptimError (2); of a recipe that does not hold, with all its problems at once.
    """
    name, data, places = _start(file_or_name)
    for key, value in (flags or {}).items():
        if value is not None:
            _put(data, places, key, value, _TYPED.get(key) or flag_of(key))
    for text in sets or []:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise OptimError(
                f"--set {text}: must be key=value",
                fix="for example --set quantize.group_size=64",
                code=USAGE,
            )
        _put(data, places, key, parse_value(value, f"--set {key}"), "--set")
    return _check(name, data, places)


def to_yaml(recipe: Recipe) -> str:
    """The recipe as a file that builds the same recipe: every key written out."""
    data = recipe.model_dump(mode="json", exclude_none=True)
    return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True))


def _start(file_or_name: str | None) -> tuple[str, dict[str, Any], dict[Path, Place]]:
    if file_or_name is None:
        return "the command line", {"version": VERSION}, {(): Place(0, "recipe")}
    label = f"{file_or_name}.yaml" if file_or_name in builtin() else file_or_name
    return label, *parse_mapping(recipe_text(file_or_name), label)


def _put(data: dict[str, Any], places: dict[Path, Place], key: str, value: Any, label: str) -> None:
    """Set a dotted key, making the sections on its way."""
    *sections, last = path = tuple(key.split("."))
    for depth, section in enumerate(sections, 1):
        data = data.setdefault(section, {})
        places.setdefault(path[:depth], Place(_AFTER_ALL_LINES, label))
        if not isinstance(data, dict):
            message = f"{label}: {'.'.join(path[:depth])} has no keys of its own"
            raise OptimError(message, fix="give its whole value", code=USAGE)
    data[last] = value
    for inner in [inside for inside in places if inside[: len(path)] == path]:
        del places[inner]
    places[path] = Place(_AFTER_ALL_LINES, label)


def _check(name: str, data: dict[str, Any], places: dict[Path, Place]) -> Recipe:
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(name, explain(error, data, places)) from None
    typed = {
        ".".join(map(str, path)): at for path, at in places.items() if at.order == _AFTER_ALL_LINES
    }
    reasons = ((at, key, idle(recipe, key)) for key, at in typed.items())
    if found := [Problem(at, f"{key} has no effect: {why}") for at, key, why in reasons if why]:
        raise RecipeError(name, found)
    return recipe


def _summary(text: str) -> str:
    """The first comment line."""
    return text.partition("\n")[0].removeprefix("#").strip()


def _unknown_recipe(name: str) -> OptimError:
    hint = did_you_mean(name, list(builtin()))
    fix = "`optim recipe list` shows the built-in ones; a file is given by its path"
    return OptimError(f"there is no recipe {name!r}{hint}", fix=fix, code=USAGE)
