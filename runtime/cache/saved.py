"""A conversation's cache as a safetensors file, so that a loaded one need not be read again.

The metadata names the model (its fingerprint) and the cache's policy: a file of another model, or
of other bits, is not used. Shapes and dtypes are checked against an empty cache before
anything is copied, as a file may come from anyone.
"""

import os
import tempfile
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError

KIND = "optim cache 1"


@runtime_checkable
class Stored(Protocol):
    """A cache that can be saved; `identity` says which others can take its `state`."""

    length: int

    @property
    def identity(self) -> str: ...
    def state(self) -> dict[str, Tensor]: ...
    def restore(self, state: dict[str, Tensor]) -> None: ...
    def truncate(self, length: int) -> None: ...


def save_cache(path: Path, cache: Stored, tokens: list[int], fingerprint: str) -> int:
    """Write `cache` of `tokens` to `path` in one step; returns its bytes.

    Raises OptimError (2) over another kind of file, or where it cannot be written.
    """
    state = {"tokens": torch.tensor(tokens[: cache.length], dtype=torch.int64)} | cache.state()
    facts = {"kind": KIND, "model": fingerprint, "policy": cache.identity}
    try:
        if path.exists() and not _ours(path):
            what = f"{path} exists and is not a saved cache"
            raise OptimError(what, "choose another name", USAGE)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        try:
            save_file(state, name, facts)
            os.chmod(name, 0o600)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
        return path.stat().st_size
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        what = f"cannot save the cache to {path}: {reason}"
        raise OptimError(what, "choose another path", USAGE) from None


def _ours(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("kind") == KIND
    except (OSError, SafetensorError):
        return False


def load_cache(path: Path, cache: Stored, fingerprint: str) -> tuple[list[int], str]:
    """Fill the empty `cache` from `path`: the tokens it holds, or none and why not."""
    if not path.is_file():
        return [], "there is no cache beside it"
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            if facts.get("kind") != KIND:
                return [], f"{path} is not a saved cache"
            if facts.get("model") != fingerprint:
                return [], "its cache is another model's"
            if facts.get("policy") != cache.identity:
                return [], f"its cache is {facts.get('policy')}, this one {cache.identity}"
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        tokens = state.pop("tokens")
        if tokens.dtype != torch.int64 or tokens.dim() != 1:
            raise ValueError("the tokens are no list of numbers")
        cache.restore(state)
        if cache.length != len(tokens):
            cache.truncate(0)
            raise ValueError(f"{len(tokens)} tokens, {cache.length} positions")
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        return [], f"its cache is damaged: {error}"
    return tokens.tolist(), ""
