"""What a method of `optim quantize` is: its answers before any work, and the blocks it solves.

The plan and the walk over the blocks know a method by this alone; methods.py is the table.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from optim.recipes.schema import Recipe, Rounding
from optim.runtime.formats.pack_quantized import Scheme
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.system.team import ALONE, Team
from optim.runtime.walk.walk import HiddenStates, Walk

Progress = Callable[[int, int, str], None]
Shapes = Mapping[str, tuple[int, int]]
"""(out, in) of each linear by canonical name."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a solver is to work on."""

    recipe: Recipe
    checkpoint: Checkpoint
    walk: Walk
    schemes: Mapping[str, Scheme]
    """Canonical module name -> scheme, for each linear to be quantized."""
    dtype: torch.dtype
    """The dtype of the stored scales and norms."""
    windows: Tensor | None
    """Calibration tokens, int64 `[n, length]`; None for a method that reads no text."""
    folder: Path
    """Where a solver may keep what it finds once: the next run goes on with it."""
    progress: Progress
    """(steps done, steps, words) of what a solver does before the first block."""
    done: Sequence[Mapping[str, Any]] = ()
    """What an unfinished run has journalled of the blocks before."""
    team: Team = ALONE
    """The processes that share the work: each reads its part of the windows."""


@dataclass(slots=True)
class Solved:
    """A compressed block and what it cost: squared errors of its output on the probe, relative."""

    block: nn.Module
    error: float | None
    rounding_error: float | None
    notes: list[str] = field(default_factory=list)
    held_back: dict[str, float] | None = None
    """Guided and unguided: what each costs the end loss on held-back text, relative."""


class Solver(Protocol):
    """A method at work on one model, block after block."""

    @property
    def windows(self) -> Tensor | None:
        """The task's tokens as block 0 is to read them, with what the method puts before each."""

    def enter(self, states: HiddenStates) -> None:
        """Change the embedded tokens before block 0 reads them, in place."""

    def solve(self, i: int, states: HiddenStates | None) -> Solved:
        """Compress block i given its inputs; OptimError (2) for weights that are not finite."""

    def tensors(self, block: nn.Module, prefix: str) -> dict[str, Tensor]:
        """What is stored of a solved block, by published name; `prefix` is the block's name."""

    def config(self, schemes: Mapping[str, Scheme], ignored: Iterable[str]) -> dict[str, Any]:
        """The artifact's `quantization_config`, of linears by their published names."""


def _nothing(section: Rounding, checkpoint: Checkpoint) -> None:
    pass


def _no_notes(recipe: Recipe, shapes: Shapes, schemes: Mapping[str, Scheme]) -> Iterator[str]:
    yield from ()


def _by_grid(section: Rounding) -> str:
    if section.grid is not None:
        return section.grid
    group = "channel" if section.group_size == -1 else f"g{section.group_size}"
    return f"w{section.bits}{group}{'-sym' if section.sym else ''}"


@dataclass(frozen=True, slots=True)
class Method:
    """A row of the table of methods."""

    begin: Callable[[Task], Solver]
    """Find what holds for all blocks."""
    reads_text: bool = True
    check: Callable[[Rounding, Checkpoint], None] = _nothing
    """Raise OptimError (2) for a model that the method cannot take."""
    notes: Callable[[Recipe, Shapes, Mapping[str, Scheme]], Iterator[str]] = _no_notes
    """What one should know beforehand, though nothing is wrong."""
    form: Callable[[Rounding], str] = _by_grid
    """How the weights are stored, in the output's default name."""
    sample_bytes: Callable[[int, int], int] = lambda tokens, widest: 0
    """Memory for what is kept of `tokens` inputs `widest` wide, beside their Gram matrices."""
    tags: tuple[str, ...] = ("compressed-tensors", "optim")
    """Of the model card."""
    programs: tuple[str, ...] = ("optim", "compressed-tensors", "vllm")
    """What runs the artifact: of storage/card.py, for its lines on the model card."""
    remark: str = ""
    """Of the model card: on other programs."""
