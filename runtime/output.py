"""The folder that a run is to make, looked at before it begins."""

import shutil
from pathlib import Path

from optim.recipes.errors import MACHINE, USAGE, OptimError


def output_problems(output: Path, force: bool, need: int) -> list[OptimError]:
    """Why `output` cannot be made: it exists, it has no place, `need` bytes do not fit."""
    problems = [exists_error(output)] if output.exists() and not force else []
    parent = next(place for place in output.absolute().parents if place.exists())
    if not parent.is_dir():
        message = f"{output} cannot be made: {parent} is not a folder"
        return [*problems, OptimError(message, "choose another -o/--output", USAGE)]
    free = shutil.disk_usage(parent).free
    if free < need:
        message = f"needs about {need / 1e9:.1f} GB of free disk in {parent}, there are "
        fix = "free some space, or choose another -o/--output"
        problems.append(OptimError(f"{message}{free / 1e9:.1f} GB", fix, MACHINE))
    return problems


def check_output(output: Path, force: bool, need: int) -> None:
    """Raise the first of the problems: OptimError 2, or 4 for the disk."""
    for problem in output_problems(output, force, need):
        raise problem


def exists_error(output: Path) -> OptimError:
    """The refusal to write over something."""
    return OptimError(
        f"{output} exists", "choose another -o/--output, or --force to replace it", USAGE
    )
