"""Which device computes, and in what number type."""

import os

import torch

from optim.recipes.errors import MACHINE, USAGE, OptimError


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:1`, ... Raises OptimError (2, or 4 if the machine lacks it)."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptimError(f"there is no device {name!r}", "use auto, cpu or cuda", USAGE) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptimError(f"this machine has no {name}", "use --device cpu", MACHINE)
    return device


def compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype of activations and of dense weights: fp32 on every CPU (docs/engine.md)."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def own_device(asked: str) -> str:
    """The device `asked` for; of several processes on a machine (torchrun) each has its own GPU."""
    rank = os.environ.get("LOCAL_RANK")
    mine = rank is not None and asked in ("auto", "cuda") and torch.cuda.is_available()
    return f"cuda:{rank}" if mine else asked
