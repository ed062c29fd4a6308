"""What a method of `optim prune` is, and what it is handed: the plan and the run know it by this.

methods.py is the table.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.recipes.schema import Recipe
from optim.runtime.architecture.table import Decoder
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.text.windows import windows_for
from optim.runtime.walk.walk import Walk

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked recipe for one model. `sizes`: weights of each site in a block."""

    recipe: Recipe
    method: "Pruner"
    checkpoint: Checkpoint
    walk: Walk
    facts: Decoder
    sizes: dict[str, int]
    neurons: int
    output: Path
    force: bool
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For the screen and for `--json`."""
        text = self.recipe.calibration.summary
        return {
            "model": self.checkpoint.name,
            "blocks": len(self.walk),
            "neurons": self.neurons,
            "sizes": self.sizes,
            "source_bytes": sum(info.nbytes for info in self.checkpoint.tensors.values()),
            "calibration": text if self.method.reads_text else "none",
            "notes": list(self.notes),
            "output": str(self.output),
            "recipe": self.recipe.model_dump(mode="json", exclude_none=True),
        }

    def check_text(self) -> None:
        """Read the calibration text as the run will; OptimError (2) says what is wrong with it."""
        windows_for(self.recipe.calibration, self.checkpoint.tokenizer())


@dataclass(frozen=True, slots=True)
class Solved:
    """What a method found: tensors of the side file, facts of each block, notes."""

    tensors: dict[str, Tensor]
    blocks: list[dict[str, Any]]
    notes: list[str]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model as a method looks at it before any work: its family's facts and a block's neurons."""

    checkpoint: Checkpoint
    facts: Decoder
    neurons: int

    def require_gate(self) -> None:
        """Refuse (OptimError 2) a model whose gate cannot be looked at without its up."""
        if self.facts.gated and len(self.facts.up) != 2:
            what = f"{self.checkpoint.source} stores gate and up as one matrix"
            fix = "leave out small inputs of all linears: -m threshold"
            raise OptimError(f"{what}: neither can be skipped alone", fix, USAGE)


@dataclass(frozen=True, slots=True)
class Pruner:
    """A row of the table of methods; `Any` is the method's own section of the recipe."""

    form: Callable[[Any], str]
    """What the output's default name says of the section."""
    solve: Callable[[Plan, Tensor, Path, Progress], Solved] | None
    """What is found on windows int64 `[n, length]`, with a folder for what does not fit in memory.

    None for a method that changes the weights and has its own run.
    """
    check: Callable[[Any, Candidate], None] = lambda section, candidate: None
    """Raise OptimError (2) for a model that the method cannot take."""
    notes: Callable[[Any, Checkpoint], Iterator[str]] = lambda section, checkpoint: iter(())
    """What is known to hurt, with the figures of docs/sparsity.md."""
    reads_text: bool = True
    """Whether what is found depends on the calibration text."""
