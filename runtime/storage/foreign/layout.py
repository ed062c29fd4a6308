"""What a checkpoint of another program is: one protocol for all of them.

A module's *pieces* are its stored tensors by their last name. They are read as pack-quantized's
(formats/pack_quantized.py) with the same integers: everything that knows those can use them.
Adding a format is a file beside this one and a row of `LAYOUTS` in layouts.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.formats.schemes import Scheme
from optim.runtime.storage.tensors import TensorInfo

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
WORDS = (torch.int32, torch.uint32)

Pieces = Mapping[str, TensorInfo]
Read = Callable[[str], Tensor]
"""One of a module's pieces."""


@dataclass(frozen=True, slots=True)
class Held:
    """A linear `[outputs, inputs]` as it is stored; without a scheme it can only be widened."""

    outputs: int
    inputs: int
    dtype: torch.dtype
    """Of its scales, or of what it is widened to."""
    scheme: Scheme | None
    kind: str
    """What people call it."""


class Layout(Protocol):
    """A format of others; made of config.json, which it may refuse with OptimError (2)."""

    pieces: tuple[str, ...]
    """What a packed module may consist of, the first of which only packed modules have."""

    def __init__(self, config: Mapping[str, Any]) -> None: ...

    def open(self, module: str, pieces: Pieces, read: Read) -> Held | None:
        """What `module` is, its shapes checked; None: it is plain. OptimError (2) for what lies."""
        ...

    def part(self, key: str, held: Held, read: Read) -> Tensor:
        """A tensor of pack-quantized; or, without a scheme, `weight` in the dtype of `held`."""
        ...


def need(module: str, pieces: Pieces, key: str, *dtypes: torch.dtype) -> tuple[int, ...]:
    """The shape of a piece that must be there, of two dimensions and one of `dtypes`."""
    info = pieces.get(key)
    if info is None:
        raise lies(f"{module}.{key}", "is missing")
    if len(info.shape) != 2 or info.dtype not in dtypes or not all(info.shape):
        kind = str(info.dtype).removeprefix("torch.")
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise lies(
            f"{module}.{key}", f"is {kind} {list(info.shape)}, expected {wanted} of two sizes"
        )
    return info.shape


def must_be(name: str, found: tuple[int, ...], wanted: tuple[int, ...], said: str) -> None:
    """Refuse a piece whose shape is not what follows from `said`."""
    if found != wanted:
        raise lies(name, f"is {list(found)}, expected {list(wanted)} with {said}")


def lies(name: str, why: str) -> OptimError:
    """A tensor that its configuration does not describe."""
    fix = "quantization_config and the weights do not belong together, or a file is damaged"
    return OptimError(f"{name} {why}", fix, USAGE)


def refused(what: str, why: str, fix: str) -> OptimError:
    """A variant of a format that is not read."""
    return OptimError(f"{what} checkpoints {why} are not read", fix, USAGE)


def number(config: Mapping[str, Any], *keys: str, among: tuple[int, ...] | None = None) -> int:
    """The integer under the first of `keys` that is there; OptimError (2) for anything else."""
    value = next((config[key] for key in keys if key in config), None)
    if type(value) is not int or (among is not None and value not in among):
        known = f", expected one of {', '.join(map(str, among))}" if among else ""
        what = f"quantization_config: {keys[0]} is {value!r}{known}"
        raise OptimError(what, "fetch the model again", USAGE)
    return value


def groups(module: str, inputs: int, size: int) -> int:
    """Scales of a row of `inputs`; OptimError (2) where the group size does not divide them."""
    size = inputs if size == -1 else size
    if size < 1 or inputs % size:
        raise lies(module, f"has {inputs} inputs, which groups of {size} do not divide")
    return inputs // size
