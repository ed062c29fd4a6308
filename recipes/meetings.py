"""Which sections of a recipe may meet, in which order they are done, and why others may not.

quantize, tune, prune, pack, export. Tuning trains the scales that quantization has written. Pruning
comes after both because what may be skipped is measured on the weights that will run; packing after
them, since it changes no value and so takes what is left in bf16; export last, and beside the
artifact: another program's copy of it.
"""

from dataclasses import dataclass
from typing import Any

ORDER = ("quantize", "tune", "prune", "pack", "export")


@dataclass(frozen=True, slots=True)
class Part:
    """A section, or those of its kind whose `key` has one of `values`."""

    section: str
    key: str = ""
    values: tuple[Any, ...] = ()

    def found(self, recipe: Any) -> bool:
        """Whether the recipe has it."""
        section = getattr(recipe, self.section)
        return section is not None and (not self.key or getattr(section, self.key) in self.values)

    def __str__(self) -> str:
        return f"{self.section} ({', '.join(map(str, self.values))})" if self.key else self.section


@dataclass(frozen=True, slots=True)
class Apart:
    """Two parts that cannot meet, and why; a third section may make it possible."""

    first: Part
    second: Part
    why: str
    unless: str = ""


TRAINED = Part("prune", "method", ("prosparse",))
STATIC = Part("quantize", "method", ("mergequant",))
ALONE = "it trains for hours under a plan of its own: go on from the folder it has written"
APART = (
    Apart(TRAINED, Part("quantize"), ALONE),
    Apart(TRAINED, Part("pack"), ALONE),
    Apart(TRAINED, Part("export"), ALONE),
    Apart(Part("prune"), STATIC, "columns of static integers cannot be skipped"),
    Apart(
        Part("prune"),
        Part("pack"),
        "packed rows cannot be skipped; beside quantize only what no block holds is packed",
        unless="quantize",
    ),
    Apart(
        Part("prune"),
        Part("export"),
        "what is skipped is not carried over: export the model itself",
        unless="quantize",
    ),
    Apart(STATIC, Part("tune"), "its scales are steps of integers that are computed with"),
    Apart(STATIC, Part("export"), "no other format has a place for the steps of its activations"),
    Apart(
        Part("quantize"),
        Part("pack", "cast", (True,)),
        "cast would round the scales: `optim pack --cast` the original, and quantize that",
    ),
)


def sections(recipe: Any) -> tuple[str, ...]:
    """The sections that a recipe has, in the order in which they are done."""
    return tuple(name for name in ORDER if getattr(recipe, name) is not None)


def refusal(recipe: Any) -> str | None:
    """Why the sections of a recipe cannot meet; None if they can."""
    if recipe.tune is not None and recipe.quantize is None:
        return "tune goes on from quantize; `optim tune ARTIFACT --against MODEL` from a folder"
    for row in APART:
        met = row.first.found(recipe) and row.second.found(recipe)
        if met and not (row.unless and getattr(recipe, row.unless) is not None):
            return f"{row.first} cannot stand beside {row.second}: {row.why}"
    return None
