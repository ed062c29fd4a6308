"""Small files: JSON that is bounded and an object, text that is replaced whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any, NoReturn

from optim.recipes.errors import MACHINE, USAGE, OptimError

AGAIN = "copy or download the file again"
MAX_JSON = 32 << 20
"""Bytes of a header or another JSON file: Python takes up to 25 times as much to hold it."""


def damaged(path: Path, why: str) -> NoReturn:
    """Say that the file at `path` cannot be what it should be."""
    raise OptimError(f"{path} is damaged: {why}", AGAIN, USAGE)


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. OptimError if it is missing, not JSON, or not an object."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"it is larger than {MAX_JSON >> 20} MB")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OptimError(f"{path} is missing", AGAIN, USAGE) from None
    except (OSError, ValueError, RecursionError) as error:
        raise OptimError(f"{path} is not readable JSON: {error}", AGAIN, USAGE) from None
    if not isinstance(value, dict):
        raise OptimError(f"{path} must hold a JSON object", AGAIN, USAGE)
    return value


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. OptimError (4) if it cannot be written."""
    new = path.with_name(path.name + ".new")
    try:
        new.write_text(text, encoding="utf-8")
        sync(new)
        os.replace(new, path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise OptimError(f"cannot write {path}: {error.strerror}", code=MACHINE) from error


def sync(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def ordinary_mode(path: Path) -> None:
    """Give a file the permissions of any other new file: some libraries make theirs private."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
