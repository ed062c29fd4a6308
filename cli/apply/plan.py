"""What a recipe of several sections will do: every section's own plan, before any work.

The plans are of the original model, which is what there is to look at: they refuse what the later
steps would refuse. An export is looked at as if the weights were quantized already.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optim.cli.options import How
from optim.recipes.errors import USAGE, OptimError
from optim.recipes.meetings import ORDER, sections
from optim.recipes.schema import Recipe

if TYPE_CHECKING:
    from optim.runtime.formats.schemes import Scheme
    from optim.runtime.storage.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Job:
    """A checked recipe of several sections for one model."""

    recipe: Recipe
    """With every value resolved, model and output included."""
    original: "Checkpoint"
    output: Path
    exported: Path | None
    plans: dict[str, dict[str, Any]]
    schemes: "Mapping[str, Scheme]"
    """Of the linears that will be quantized."""
    how: How
    keep: bool
    """Whether the folders of the steps in between stay."""

    @property
    def steps(self) -> tuple[str, ...]:
        """The sections that make the artifact."""
        return tuple(name for name in sections(self.recipe) if name != "export")

    @property
    def stated(self) -> dict[str, Any]:
        """The recipe as the manifest has it."""
        return self.recipe.model_dump(mode="json", exclude={"output"}, exclude_none=True)

    @property
    def is_there(self) -> bool:
        """Whether an earlier run of the same recipe on the same model has made the artifact."""
        from optim.runtime.storage.manifest import read_manifest

        found = read_manifest(self.output) if self.output.is_dir() else None
        if found is None or found.source is None or found.recipe != self.stated:
            return False
        return found.source.sha256 == self.original.fingerprint()

    @property
    def kept(self) -> Path:
        """Where the folders of the steps in between stay."""
        return beside(self.output, ".steps")

    def as_dict(self) -> dict[str, Any]:
        """For the screen and for `--json`."""
        notes = [note for plan in self.plans.values() for note in plan.get("notes", ())]
        return {
            "model": self.original.name,
            "steps": self.plans,
            "notes": list(dict.fromkeys(notes)),
            "output": str(self.output),
            "exported": None if self.exported is None else str(self.exported),
            "recipe": self.stated,
        }


def plan(recipe: Recipe, name: str, how: How, keep: bool) -> Job:
    """Check everything that can be checked before the work; `name` ends the output's default name.

    Raises OptimError as the commands of the sections do.
    """
    from optim.runtime.storage.open import open_checkpoint
    from optim.runtime.system.output import refusal

    assert recipe.model is not None
    original = open_checkpoint(recipe.model, trust_remote_code=how.trust_remote_code)
    output = Path(recipe.output or f"./{original.name}-{name}")
    recipe = recipe.model_copy(update={"output": str(output)})
    recipe, plans, schemes = _plans(recipe, original, how)
    job = Job(recipe, original, output, _exported(output, recipe, how), plans, schemes, how, keep)
    there = job.exported is not None and not how.force and job.is_there
    if not there and (problem := refusal(output, how.force)) is not None:
        raise problem
    if keep and os.path.lexists(job.kept):
        raise OptimError(f"{job.kept} exists", "move it away, or leave --keep-steps out", USAGE)
    return job


def only(recipe: Recipe, section: str, source: str = "", output: str = "") -> Recipe:
    """The recipe with one of its sections; `source` and `output` in place of its own."""
    others = dict.fromkeys(name for name in ORDER if name != section)
    places = {"model": source or recipe.model, "output": output or recipe.output}
    return recipe.model_copy(update={**others, **places})


def beside(output: Path, ending: str) -> Path:
    """The output's name with an ending."""
    return output.with_name(output.name + ending)


def _plans(
    recipe: Recipe, original: "Checkpoint", how: How
) -> tuple[Recipe, dict[str, dict[str, Any]], "Mapping[str, Scheme]"]:
    """The resolved recipe, each section's plan, and how linears will be stored."""
    from optim.export import planned
    from optim.export.lossless.plan import plan as packing
    from optim.prune.plan import plan as pruning
    from optim.quant.plan import plan as quantizing

    given = replace(how, force=True).given  # what may be replaced is for `plan` to say
    plans: dict[str, dict[str, Any]] = {}
    schemes: Mapping[str, Scheme] = {}
    if recipe.quantize is not None:
        made = quantizing(only(recipe, "quantize"), **given)
        made.check_text()
        recipe = recipe.model_copy(update={"quantize": made.recipe.quantize})
        plans["quantize"], schemes = made.as_dict(), made.schemes
    if recipe.tune is not None:
        plans["tune"] = _tuning(recipe, schemes)
    if recipe.prune is not None:
        plans["prune"] = pruning(only(recipe, "prune"), **given).as_dict()
    if recipe.pack is not None:
        plans["pack"] = packing(original, recipe.pack, recipe.output, force=True).as_dict()
    if recipe.export is not None:
        plans["export"] = planned.plan(original, schemes, recipe.export)
    return recipe, plans, schemes


def _tuning(recipe: Recipe, schemes: "Mapping[str, Scheme]") -> dict[str, Any]:
    """What tuning will do; OptimError (2) for linears without scales of their own."""
    assert recipe.tune is not None
    if any(scheme.blocks for scheme in schemes.values()):
        what = "the scales in GGUF's blocks are integers themselves: they cannot be tuned"
        raise OptimError(what, "leave out grid, or tune", USAGE)
    return recipe.tune.model_dump() | {"calibration": recipe.calibration.summary}


def _exported(output: Path, recipe: Recipe, how: How) -> Path | None:
    """Where the export of an artifact stands; OptimError (2) if it cannot stand there."""
    if recipe.export is None:
        return None
    from optim.export.formats import FORMATS
    from optim.export.run import check_place

    exporter = FORMATS[recipe.export.format]
    place = beside(output, exporter.suffix or f"-{recipe.export.format}")
    check_place(place, exporter, how.force, 0)
    return place
