"""Whether an artifact's shards are still those its manifest names, byte for byte."""

import hashlib
from pathlib import Path
from typing import Any

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.system.files import load_json
from optim.runtime.system.output import MANIFEST

__all__ = ["MANIFEST", "read_manifest", "sha256", "verify"]


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of an artifact folder; None where there is none."""
    return load_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else None


def verify(folder: Path) -> list[str]:
    """Hash every shard again; returns what does not hold, nothing if all is well.

    Raises OptimError (2) if the folder has no manifest with shards to compare with.
    """
    shards = (read_manifest(folder) or {}).get("shards")
    if not isinstance(shards, dict) or not shards:
        fix = "only artifacts that optim wrote carry hashes"
        raise OptimError(f"there is no {MANIFEST} with hashes to verify", fix, USAGE)
    present = {path.name for path in folder.glob("*.safetensors")}
    problems = [f"{name} is not in the manifest" for name in sorted(present - set(shards))]
    for name, expected in shards.items():
        if name not in present:
            problems.append(f"{name} is missing")
        elif sha256(folder / name) != expected:
            problems.append(f"{name} has changed since it was written")
    return problems


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
