"""What a layout is that packs bf16 weights without loss: one protocol for reading and writing.

A *unit* is what is coded together: some tensors, stored as the layout's pieces under the unit's
name. Adding a layout is a file beside this one, a row of `LAYOUTS` and a word of the recipe schema.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.kernels.door import Array
from optim.runtime.storage.tensors import TensorInfo

BLOCK = re.compile(r"((?:.*\.)?(?:layers?|blocks?|h)\.\d+)\.(.+)")
"""A block's tensor: the block, and the name inside."""
Size = tuple[torch.dtype, tuple[int, ...]]
"""dtype and shape of a piece."""
Read = Callable[[str, int, int], Array]
"""Bytes `start`..`stop` of one of a unit's pieces."""
ShapeOf = Callable[[str, int], tuple[int, ...]]
"""The shape of a packed tensor by its name and number of weights, where the layout lacks it."""
Places = list[tuple[int, tuple[int, ...]]]
"""For each tensor of a unit the first of its weights, and its shape."""


class Coded(Protocol):
    """A stored unit; OptimError (2) naming the piece that cannot be true."""

    def decode(self, first: int, count: int) -> Tensor:
        """`count` weights from element `first` on: bf16 `[count]`."""
        ...


class Tally(Protocol):
    """The first pass over a tensor: what is counted decides the code."""

    def add(self, weights: Tensor) -> None:
        """Count some more bf16 weights."""
        ...

    @property
    def unfit(self) -> str:
        """Why the layout cannot hold them, or gains nothing; empty if it can."""
        ...

    def limit(self) -> float:
        """Bits a weight that no code of single weights goes below."""
        ...


class Encoder(Protocol):
    """The second pass: a unit's weights in order, then what is left."""

    def sizes(self) -> dict[str, Size]:
        """Every piece, known before the first weight."""
        ...

    def bits(self, tally: Any) -> float:
        """Bits a weight of the tensor that `tally` counted."""
        ...

    def push(self, weights: Tensor) -> dict[str, Array]:
        """The next weights: what to append to each piece."""
        ...

    def finish(self) -> dict[str, Array]:
        """The rest of the pieces."""
        ...


class Layout(Protocol):
    """How units are found, read and written."""

    @property
    def key(self) -> str:
        """Of config.json: the model is packed so if it is there."""
        ...

    @property
    def title(self) -> str:
        """What people call it."""
        ...

    @property
    def expected_bits(self) -> float:
        """A weight, for the plan; what comes out is measured."""
        ...

    @property
    def prefix(self) -> str:
        """Before a piece's name, in a file: `<unit>.<prefix><piece>`."""
        ...

    @property
    def pieces(self) -> tuple[str, ...]: ...

    @property
    def joins(self) -> bool:
        """Whether the linears of a block are one unit; else a tensor is one, under its own name."""
        ...

    def units(
        self, names: Mapping[str, TensorInfo], config: Mapping[str, Any], shapes: Mapping[str, Any]
    ) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Every unit among the stored `names`, and the tensors it stands for, in order.

        `config` is config.json, `shapes` what the manifest knows. OptimError (2).
        """
        ...

    def open(
        self,
        unit: str,
        tensors: Sequence[str],
        infos: Mapping[str, TensorInfo],
        read: Read,
        shape_of: ShapeOf,
    ) -> tuple[Coded, Places]:
        """A unit and where its tensors are; `infos` and `read` by the names of `pieces`."""
        ...

    def config(self, units: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """What config.json gets under `key`, of all units that were written."""
        ...

    def tally(self) -> Tally: ...

    def encoder(self, tallies: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> Encoder:
        """For a unit of tensors with these counts and shapes."""
        ...


def damaged(tensor: str, why: str) -> OptimError:
    """A stored piece, or packed tensor, that cannot be used."""
    return OptimError(f"{tensor} is damaged: {why}", "fetch or pack the model again", USAGE)
