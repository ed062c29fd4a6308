"""What `optim prune` will do to a model, checked before the first weight is read."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.recipes.schema import CoreInfer, Recipe, ReluExact, Threshold
from optim.runtime.architecture.shape import resolve
from optim.runtime.architecture.table import FAMILIES, Decoder
from optim.runtime.sparsity.bytes_read import site_sizes
from optim.runtime.sparsity.side_file import require_known
from optim.runtime.storage.checkpoint import Checkpoint, open_checkpoint
from optim.runtime.storage.dense_view import PlainView
from optim.runtime.system.machine import pick_device
from optim.runtime.system.output import check_output
from optim.runtime.walk.walk import Walk

Progress = Callable[[int, int, str], None]
FORMATS = ("compressed-tensors",)
SAFE = 0.3  # sparsity of all linears beyond which small models lose much
SMALL = 1e9  # weights


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked recipe for one model. `sizes`: weights of each site in a block."""

    recipe: Recipe
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
            "calibration": "none" if isinstance(self.recipe.prune, ReluExact) else text,
            "notes": list(self.notes),
            "output": str(self.output),
            "recipe": self.recipe.model_dump(mode="json", exclude_none=True),
        }


@dataclass(frozen=True, slots=True)
class Solved:
    """What a method found: tensors of the side file, facts of each block, notes."""

    tensors: dict[str, Tensor]
    blocks: list[dict[str, Any]]
    notes: list[str]


def plan(
    recipe: Recipe,
    *,
    force: bool = False,
    device: str = "auto",
    threads: int | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Open the recipe's model and check all that can be checked without its weights.

    Raises OptimError: 2 for what the recipe or the model gets wrong, 4 for what the machine lacks.
    """
    assert recipe.model is not None
    section = recipe.prune
    if section is None:
        raise OptimError("the recipe has no section prune", "give a method: -m threshold", USAGE)
    if threads:
        torch.set_num_threads(threads)
    checkpoint = open_checkpoint(recipe.model, trust_remote_code=trust_remote_code)
    facts = require_known(checkpoint)
    _require_format(checkpoint)
    if isinstance(section, ReluExact):
        require_relu(checkpoint)
    needs_gate = isinstance(section, ReluExact) or getattr(section, "only", "") == "gate"
    if needs_gate and facts.gated and len(facts.up) != 2:
        raise OptimError(
            f"{checkpoint.source} stores gate and up as one matrix: neither can be skipped alone",
            "leave out small inputs of all linears: -m threshold",
            USAGE,
        )
    walk = Walk(PlainView(checkpoint), pick_device(device))
    sizes = site_sizes(walk, facts)
    neurons = int(walk.blocks[0].get_parameter(f"{facts.down}.weight").shape[1])
    output = Path(recipe.output or f"./{checkpoint.name}-{_short(recipe)}")
    need = sum(info.nbytes for info in checkpoint.tensors.values())
    check_output(output, force, need, [*checkpoint.places, *recipe.calibration.places])
    if isinstance(section, CoreInfer) and round(section.keep * neurons) < 1:
        raise OptimError(
            f"keep {section.keep:g} of {neurons} neurons leaves none", "keep more", USAGE
        )
    return Plan(
        recipe=recipe.model_copy(update={"output": str(output)}),
        checkpoint=checkpoint,
        walk=walk,
        facts=facts,
        sizes=sizes,
        neurons=neurons,
        output=output,
        force=force,
        notes=tuple(_notes(recipe, checkpoint)),
    )


def is_relu(checkpoint: Checkpoint) -> bool:
    """Whether the model's feed-forward gives exact zeros; False for families that are unknown."""
    facts = FAMILIES.get(checkpoint.family)
    return facts is not None and resolve(checkpoint.settings, facts.decoder).activation == "relu"


def require_relu(checkpoint: Checkpoint) -> None:
    """Refuse (OptimError 2) a model whose activation gives no exact zeros."""
    if not is_relu(checkpoint):
        raise OptimError(
            f"{checkpoint.source} is no ReLU model: its activation gives no exact zeros",
            "leave out what is small: -m threshold; or train it: -m prosparse",
            USAGE,
        )


def _require_format(checkpoint: Checkpoint) -> None:
    method = (checkpoint.quantization or {}).get("quant_method")
    if method is not None and method not in FORMATS:
        raise OptimError(
            f"{checkpoint.source} is quantized with {method}, whose columns cannot be skipped",
            "start from the 16-bit model, or from what `optim quantize` wrote",
            USAGE,
        )


def _short(recipe: Recipe) -> str:
    section = recipe.prune
    if isinstance(section, Threshold):
        only = "" if section.only == "all" else f"-{section.only}"
        return f"threshold{only}-s{round(100 * section.sparsity)}"
    if isinstance(section, CoreInfer):
        return f"coreinfer-k{round(100 * section.keep)}"
    return section.method if section is not None else "pruned"


def _notes(recipe: Recipe, checkpoint: Checkpoint) -> list[str]:
    """What is known to hurt, with the figures of docs/sparsity.md."""
    section = recipe.prune
    weights = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    notes = []
    if isinstance(section, CoreInfer) and section.keep < 1:
        notes.append(
            "a fixed set of neurons is lossy: perplexity of demo x1.3 at keep 0.8, x2 at 0.6, "
            "x5 at 0.4 (x1.7 and x3 with measured budgets); thresholds lose less at the same bytes"
        )
        if section.score == "paper":
            notes.append("the paper's score ignores negative activations: x600 at keep 0.4 on demo")
    if isinstance(section, Threshold) and section.only == "all" and section.sparsity > SAFE:
        notes.append(
            f"{section.sparsity:.0%} is much: perplexity of demo x1.02 at 25 %, x1.13 at 40 %, "
            "x1.4 at 50 %"
            + ("; models below 1 B bear 25 % (--sparsity 0.25)" if weights < SMALL else "")
        )
    if (checkpoint.quantization or {}).get("quant_method") and isinstance(section, Threshold):
        notes.append(
            "beside 4 bits a CPU skips inputs of linears with 3,072 outputs or more only: reading "
            "the others whole is as fast"
        )
    return notes
