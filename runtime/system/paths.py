"""Where `optim` keeps what it fetches and makes for later."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where fetched and converted files are kept: $OPTIM_CACHE, or `optim` in the XDG cache."""
    if own := os.environ.get("OPTIM_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "optim"
