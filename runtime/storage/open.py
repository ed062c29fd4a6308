"""Open a model, whatever it is: a local folder, a `.gguf` file, a hub id, or `demo`."""

import os
from pathlib import Path
from typing import Any

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.architecture.config import needs_remote_code
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.demo import demo_file
from optim.runtime.storage.foreign.layouts import foreign_layout
from optim.runtime.storage.foreign.store import ForeignStore
from optim.runtime.storage.hub import HUB_ID, fetch
from optim.runtime.storage.lossless.layouts import layout_of, without_layout
from optim.runtime.storage.lossless.store import open_lossless
from optim.runtime.storage.tensors import Store, open_files
from optim.runtime.system.files import load_json

SOURCES = "a local folder, a .gguf file, a hub id like Qwen/Qwen3-0.6B, or `demo`"


def _open_folder(folder: Path, source: str, name: str, trust: bool, gate: bool) -> Checkpoint:
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        fix = "merge it into its base model first (peft: merge_and_unload)"
        raise OptimError(f"{source} is a LoRA adapter, not a model", fix, USAGE)
    if not (folder / "config.json").is_file():
        raise OptimError(f"{source} has no config.json", f"give {SOURCES}", USAGE)
    config = load_json(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise OptimError(f"{source}: config.json names no model_type", f"give {SOURCES}", USAGE)
    if not trust and needs_remote_code(config):
        raise OptimError(
            f"{source} (model type {config['model_type']}) brings its own code, which is not run",
            "read that code; then pass --trust-remote-code if you trust it",
            USAGE,
        )
    store, config = _open_store(folder, config)
    return Checkpoint(source, name, config, folder, store, trust, gate)


def _open_store(folder: Path, config: dict[str, Any]) -> tuple[Store, dict[str, Any]]:
    """The weights of a folder, and its configuration without what says how they are packed."""
    if (foreign := foreign_layout(config)) is not None:
        return ForeignStore(open_files(folder), foreign), config
    if layout_of(config) is None:
        return open_files(folder), config
    return open_lossless(folder, config), without_layout(config)


def _open_gguf(path: Path, source: str, name: str) -> Checkpoint:
    from optim.runtime.storage.gguf.store import open_gguf

    return open_gguf(path, source, name)


def open_checkpoint(
    source: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    gate: bool = True,
) -> Checkpoint:
    """Open `source`: `demo`, a folder, a `.gguf` file, or a hub id (fetched at `revision`,
    or as `owner/name@revision`).

    Without `gate`, what does not fit the configuration stays: for who only looks. Raises OptimError
    (2) if it is none of them, is damaged or does not fit its configuration, (4) if the hub cannot
    be reached.
    """
    path = Path(os.path.expanduser(source))
    if source == "demo":
        return _open_gguf(demo_file(), source, "SmolLM2-135M-Instruct")
    if path.is_dir():
        return _open_folder(path, source, path.resolve().name, trust_remote_code, gate)
    if path.is_file() and path.suffix == ".gguf":
        return _open_gguf(path, source, path.stem)
    if path.is_file():
        raise OptimError(f"{source} is not a model", f"give {SOURCES}", USAGE)
    name, _, wanted = source.partition("@")
    if path.suffix == ".gguf" or not HUB_ID.fullmatch(name) or source.endswith("@"):
        raise OptimError(f"there is no folder or file {source}", f"give {SOURCES}", USAGE)
    folder = fetch(name, revision or wanted or None)
    return _open_folder(folder, source, name.split("/")[1], trust_remote_code, gate)
