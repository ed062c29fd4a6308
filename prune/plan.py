"""What `optim prune` will do to a model, checked before the first weight is read."""

from pathlib import Path

import torch

from optim.prune.methods import METHODS
from optim.prune.pruner import Candidate, Plan
from optim.recipes.errors import USAGE, OptimError
from optim.recipes.schema import Recipe
from optim.runtime.sparsity.bytes_read import site_sizes
from optim.runtime.sparsity.side_file import require_known
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.dense_view import PlainView
from optim.runtime.storage.join import MOST_BYTES
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.system.devices import pick_device
from optim.runtime.system.output import check_output
from optim.runtime.text.windows import calibration_notes
from optim.runtime.walk.walk import Walk

__all__ = ["Plan", "plan"]

FORMATS = ("compressed-tensors",)


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
    walk = Walk(PlainView(checkpoint), pick_device(device))
    sizes = site_sizes(walk, facts)
    neurons = int(walk.blocks[0].get_parameter(f"{facts.down}.weight").shape[1])
    method = METHODS[section.method]
    method.check(section, Candidate(checkpoint, facts, neurons))
    output = Path(recipe.output or f"./{checkpoint.name}-{method.form(section)}")
    need = sum(info.nbytes for info in checkpoint.tensors.values())
    need *= 2 if need <= MOST_BYTES else 1  # the shards and the one file of them
    check_output(output, force, need, [*checkpoint.inputs(), *recipe.calibration.places])
    return Plan(
        recipe=recipe.model_copy(update={"output": str(output)}),
        method=method,
        checkpoint=checkpoint,
        walk=walk,
        facts=facts,
        sizes=sizes,
        neurons=neurons,
        output=output,
        force=force,
        notes=(
            *method.notes(section, checkpoint),
            *(calibration_notes(checkpoint.tokenizer()) if method.reads_text else ()),
        ),
    )


def _require_format(checkpoint: Checkpoint) -> None:
    method = (checkpoint.quantization or {}).get("quant_method")
    if method is not None and method not in FORMATS:
        raise OptimError(
            f"{checkpoint.source} is quantized with {method}, whose columns cannot be skipped",
            "start from the 16-bit model, or from what `optim quantize` wrote",
            USAGE,
        )
