"""What torchrun tells the processes that it starts, by its environment."""

import os

from optim.recipes.errors import USAGE, OptimError


def processes() -> int:
    """How many processes torchrun has started for this work, this one included."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leads() -> bool:
    """Whether this is the process that speaks and writes: the first one."""
    return os.environ.get("RANK", "0") == "0"


def need_one(what: str, fix: str) -> None:
    """OptimError (2) if there are several processes, for `what` only one can do."""
    if (count := processes()) > 1:
        message = f"{what} is the work of one process, and torchrun has started {count}"
        raise OptimError(message, fix, USAGE)
