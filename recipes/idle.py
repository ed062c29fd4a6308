"""Keys that have no effect beside others: typed, they are refused, not passed over in silence.

A recipe that was written out has every key, so what a file says at its default is no wish.
"""

from collections.abc import Callable
from dataclasses import dataclass

from optim.recipes.schema import CoreInfer, Guided, ProSparse, Recipe, Rounding, Threshold


@dataclass(frozen=True, slots=True)
class Idle:
    """`keys` do nothing in a recipe for which `holds` is true, because of `why`."""

    keys: tuple[str, ...]
    holds: Callable[[Recipe], bool]
    why: str


def _solves_in_blocks(recipe: Recipe) -> bool:
    return isinstance(recipe.quantize, Rounding) and recipe.quantize.grid is not None


def _unguided(recipe: Recipe) -> bool:
    return isinstance(recipe.quantize, Guided) and not recipe.quantize.guides


def _only_rounds(recipe: Recipe) -> bool:
    return not getattr(recipe.quantize, "compensate", True)


def _has_one_site(recipe: Recipe) -> bool:
    return isinstance(recipe.prune, Threshold) and recipe.prune.only in ("down", "gate")


def _counts_all(recipe: Recipe) -> bool:
    return isinstance(recipe.prune, CoreInfer) and recipe.prune.score != "paper"


def _moves_weights(recipe: Recipe) -> bool:
    return isinstance(recipe.prune, ProSparse) and recipe.prune.train != "lora"


def _reads_own_text(recipe: Recipe) -> bool:
    return recipe.calibration.dataset.partition(":")[0] in ("builtin", "self")


GRID = tuple(f"quantize.{key}" for key in ("bits", "group_size", "sym"))
IDLE = (
    Idle(GRID, _solves_in_blocks, "quantize.grid has its own"),
    Idle(("quantize.guide_groups",), _unguided, "they are parts of quantize.guide=loss"),
    Idle(("quantize.damping",), _only_rounds, "it is a part of quantize.compensate"),
    Idle(("prune.allocation",), _has_one_site, "prune.only leaves one kind of linear a block"),
    Idle(("prune.alpha",), _counts_all, "it is a part of prune.score=paper"),
    Idle(("prune.rank",), _moves_weights, "it is a part of prune.train=lora"),
    Idle(
        ("calibration.split", "calibration.text_column"),
        _reads_own_text,
        "it is said of files and data sets",
    ),
)


def idle(recipe: Recipe, key: str) -> str | None:
    """Why `key` does nothing in this recipe; None if it does something."""
    return next((row.why for row in IDLE if key in row.keys and row.holds(recipe)), None)
