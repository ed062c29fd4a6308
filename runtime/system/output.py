"""The folder that a run is to make, looked at before it begins: what it holds, and what fits.

Nothing is replaced but what `optim` itself has made, and never what the run reads.
"""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from optim.recipes.errors import MACHINE, USAGE, OptimError
from optim.recipes.units import size, sizes_apart

MANIFEST = "optim.json"
MARK = "optim.version"
"""In the head of a single file that optim has made."""
ANOTHER = "choose another -o/--output"
SHOWN = 3  # names in a message


def output_problems(
    output: Path, force: bool, need: int, inputs: Iterable[Path] = ()
) -> list[OptimError]:
    """Why `output` cannot be made; `need` bytes must fit, and none of `inputs` may be touched."""
    try:
        os.lstat(output)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        message = f"{output} cannot be made: {getattr(error, 'strerror', None) or error}"
        return [OptimError(message, ANOTHER, USAGE)]
    problems = [_overlap(output, path) for path in inputs]
    problems += [refusal(output, force), foreign_workspace(workspace_of(output))]
    problems += _place_problems(output, need)
    return [problem for problem in problems if problem is not None]


def check_file(
    output: Path, suffix: str, force: bool, need: int, inputs: Iterable[Path] = ()
) -> None:
    """As check_output, for a single file. Nothing is replaced that has not our MARK."""
    if output.suffix != suffix:
        raise OptimError(f"{output} is no name of a {suffix} file", f"-o NAME{suffix}", USAGE)
    if any(output.resolve() == path.resolve() for path in inputs):
        raise OptimError(f"{output} is what is read: it would be lost", ANOTHER, USAGE)
    if output.is_symlink() or output.is_dir():
        raise OptimError(f"{output} is a link or a folder", ANOTHER, USAGE)
    if output.exists():
        with output.open("rb") as file:
            ours = MARK.encode() in file.read(4096)
        if not ours:
            what = f"{output} exists, and optim has not made it"
            raise OptimError(what, f"{ANOTHER}; --force replaces only what optim made", USAGE)
        if not force:
            raise OptimError(f"{output} exists", f"{ANOTHER}, or --force to replace it", USAGE)
    for problem in _place_problems(output, need):
        raise problem


def _place_problems(output: Path, need: int) -> list[OptimError]:
    """Why `need` bytes cannot be written where `output` is to be."""
    problems = []
    parent = next(place for place in output.absolute().parents if place.exists())
    if not parent.is_dir():
        message = f"{output} cannot be made: {parent} is not a folder"
        return [OptimError(message, ANOTHER, USAGE)]
    if not os.access(parent, os.W_OK | os.X_OK):
        problems.append(cannot_write(parent))
    free = shutil.disk_usage(parent).free
    if free < need:
        needs, has = sizes_apart(need, free)
        message = f"needs about {needs} of free disk in {parent}, there are {has}"
        problems.append(OptimError(message, f"free some space, or {ANOTHER}", MACHINE))
    return problems


def check_output(output: Path, force: bool, need: int, inputs: Iterable[Path] = ()) -> None:
    """Raise the first of the problems: OptimError 2, or 4 for the disk."""
    for problem in output_problems(output, force, need, inputs):
        raise problem


def refusal(output: Path, force: bool) -> OptimError | None:
    """Why what stands at `output` may not be replaced; None if nothing is there, or it may."""
    if output.is_symlink():
        message = f"{output} is a link to {os.readlink(output)}"
        return OptimError(message, f"give that folder itself, or {ANOTHER}", USAGE)
    if not output.exists():
        return None
    if not is_artifact(output):
        what = f"{output} exists, and optim has not made it: {contents(output)}"
        return OptimError(what, f"{ANOTHER}; --force replaces only what optim made", USAGE)
    if not force:
        return OptimError(f"{output} exists", f"{ANOTHER}, or --force to replace it", USAGE)
    return None


def is_artifact(folder: Path) -> bool:
    """Whether `optim` has made a folder: it has our manifest, and a shard that is named there.

    An empty folder counts, since nothing in it can be lost.
    """
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    try:
        shards = json.loads((folder / MANIFEST).read_bytes())["shards"]
        return isinstance(shards, dict) and any((folder / name).is_file() for name in shards)
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return False


def contents(path: Path) -> str:
    """What stands at a path, in a few words: its size, or what a folder holds at its top."""
    if not path.is_dir():
        return f"a file of {size(path.lstat().st_size)}"
    entries = sorted(path.iterdir())
    if not entries:
        return "an empty folder"
    names = [entry.name + "/" * entry.is_dir() for entry in entries]
    files = [entry.lstat().st_size for entry in entries if not entry.is_dir()]
    held = f"{size(sum(files))} in {len(files)} files" if files else "folders"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{held} ({', '.join(names[:SHOWN])}{more})"


def workspace_of(output: Path) -> Path:
    """The folder that holds an artifact while it is being made."""
    return output.with_name(output.name + ".partial")


def foreign_workspace(folder: Path) -> OptimError | None:
    """Why a folder may not serve as a workspace: it holds what no run of ours has put there."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        return OptimError(f"{folder} is in the way: it is no folder", ANOTHER, USAGE)
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    begun = names <= {"lock", "artifact", "journal.new"}  # killed before its first line
    if "journal.jsonl" in names or (begun and not any(folder.glob("artifact/*"))):
        return None
    message = f"{folder} is in the way, and optim has not made it: {contents(folder)}"
    return OptimError(message, f"{ANOTHER}, or move that one away", USAGE)


def cannot_write(path: Path, error: OSError | None = None) -> OptimError:
    """What to say of a place that one may not write to."""
    why = f": {error.strerror or error}" if error is not None else ""
    return OptimError(f"Cannot write to {path}{why}", f"{ANOTHER}, or allow it", MACHINE)


def _overlap(output: Path, path: Path) -> OptimError | None:
    """Whether the output is the input, inside of it, or around it, links followed."""
    here, there = output.resolve(), path.resolve()
    if here == there:
        what = f"{output} is what is read: it would be lost"
    elif there in here.parents:
        what = f"{output} is inside {path}, which is read"
    elif here in there.parents:
        what = f"{output} holds {path}, which is read: it would be lost"
    else:
        return None
    return OptimError(what, ANOTHER, USAGE)
