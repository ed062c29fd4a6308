"""`optim apply`: a recipe with all of its sections, whatever command they belong to."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optim.cli import export, pack, prune, quantize
from optim.cli.apply.several import several
from optim.cli.compress import recipe_of
from optim.cli.options import How
from optim.recipes.meetings import sections
from optim.recipes.schema import Recipe

ALONE: Mapping[tuple[str, ...], Callable[[Recipe, How], None]] = {
    ("quantize",): quantize.work,
    ("prune",): prune.work,
    ("pack",): pack.work,
    ("export",): export.work,
}


def apply(
    file_or_name: str, keys: dict[str, Any], sets: Sequence[str], how: How, keep: bool = False
) -> None:
    """Carry out a recipe; one with a single section as the command of that name."""
    recipe = recipe_of("apply", file_or_name, keys, sets, how)
    if recipe is None:
        return
    alone = ALONE.get(sections(recipe))
    if alone is not None:
        return alone(recipe, how)
    several(recipe, file_or_name, how, keep)
