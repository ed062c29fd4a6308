"""Small files, and what is said of one that is not what it should be."""

import json
from pathlib import Path
from typing import Any, NoReturn

from optim.recipes.errors import USAGE, OptimError

AGAIN = "copy or download the file again"
MAX_JSON = 32 << 20


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
