"""Everything that is wrong with a recipe, each problem at its line or flag."""

from difflib import get_close_matches
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from optim.recipes.errors import USAGE, OptimError
from optim.recipes.schema import SECTIONS, Calibration, Override, Recipe, Rounding
from optim.recipes.section import Section
from optim.recipes.writing import Export, Pack

Path = tuple[str | int, ...]

# Where pydantic speaks of Python, a recipe speaks of itself.
_MUST = {
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "tuple_type": "must be a list",
    "too_short": "must name at least one",
    "finite_number": "must be a finite number",
}


class Place(NamedTuple):
    """Where a value was given: `order` sorts, `label` is shown ("bad.yaml:5", "--bits")."""

    order: int
    label: str


class Problem(NamedTuple):
    """One thing that is wrong."""

    place: Place
    text: str

    def __str__(self) -> str:
        return f"{self.place.label}: {self.text}"


class RecipeError(OptimError):
    """A recipe that does not hold, with all of its problems."""

    def __init__(self, name: str, problems: list[Problem]) -> None:
        self.problems = [str(problem) for problem in sorted(problems)]
        count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
        lines = "".join(f"\n  {problem}" for problem in self.problems)
        super().__init__(f"{name} is not a valid recipe ({count}){lines}", code=USAGE)


def did_you_mean(word: str, choices: list[str]) -> str:
    """`; did you mean 'x'?`, or nothing where no choice is close."""
    close = get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def explain(
    error: ValidationError, data: dict[str, Any], places: dict[Path, Place]
) -> list[Problem]:
    """Say each of pydantic's errors in the recipe's own words and at its place.

    `data` is what was validated, `places` where each of its values stands.
    """
    problems = []
    for details in error.errors(include_url=False):
        if details["type"] == "too_short" and details["input"]:
            continue  # an entry was refused, and that is said already
        method = _method(data, details["loc"])
        path = _without_tag(details["loc"], method)
        problems.append(Problem(_nearest(path, places), _say(details, path, method)))
    return problems


def _method(data: dict[str, Any], loc: Path) -> Any:
    """The method that the section around `loc` gives, if sections of its name have one."""
    section = data.get(str(loc[0])) if loc and loc[0] in SECTIONS else None
    return section.get("method") if isinstance(section, dict) else None


def _without_tag(loc: Path, method: Any) -> Path:
    """Pydantic names the union's member in its path; the file does not."""
    if len(loc) > 1 and loc[0] in SECTIONS and loc[1] == method:
        return (loc[0], *loc[2:])
    return loc


def _nearest(path: Path, places: dict[Path, Place]) -> Place:
    """The place of `path`, or of the nearest part of the recipe around it."""
    while path not in places:
        path = path[:-1]
    return places[path]


def _say(details: ErrorDetails, path: Path, method: Any) -> str:
    where = ".".join(str(part) for part in path) or "recipe"
    kind, given = details["type"], details["input"]
    if kind == "extra_forbidden":
        return f"{where}: {_unknown_key(path, method)}"
    if kind == "missing":
        return f"{where}: must be given"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        return f"{where}.method: {_unknown_method(method, list(SECTIONS[str(path[0])]))}"
    if kind in ("model_type", "model_attributes_type"):
        return f"{where}: must be a mapping of keys to values (got {_show(given)})"
    if kind == "value_error":
        return f"{where}: {details['ctx']['error']}" if path else str(details["ctx"]["error"])
    must = _MUST.get(kind) or details["msg"].replace("Input should", "must")
    return f"{where}: {must.replace('True or False', 'true or false')} (got {_show(given)})"


def _unknown_key(path: Path, method: Any) -> str:
    key, keys = str(path[-1]), _keys_of(path[:-1], method)
    methods = SECTIONS.get(str(path[0]), {})
    owners = [name for name, model in methods.items() if key in model.model_fields]
    if len(path) == 2 and owners and method in methods:
        return f"not a key of method {method!r} (it is one of {' and '.join(owners)})"
    return f"unknown key{did_you_mean(key, keys)}"


def _unknown_method(method: Any, choices: list[str]) -> str:
    listed = ", ".join(map(repr, choices))
    if method is None:
        return f"must be given; choose one of {listed}"
    return f"unknown method {_show(method)}; choose one of {listed}"


def _show(value: Any) -> str:
    """A value as a recipe spells it, never longer than a line."""
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _keys_of(path: tuple[str | int, ...], method: str | None) -> list[str]:
    """The keys allowed under `path`; `method` is its section's, if it is a known one."""
    section: type[Section] = Recipe
    if path[:1] == ("calibration",):
        section = Calibration
    elif path[:1] == ("pack",):
        section = Pack
    elif path[:1] == ("export",):
        section = Export
    elif path[:2] == ("quantize", "overrides"):
        section = Override
    elif path and path[0] in SECTIONS:
        shared = Rounding if path[0] == "quantize" else Section
        section = SECTIONS[str(path[0])].get(method or "", shared)
    return list(section.model_fields)
