"""`optim prune`: measure on calibration text, then write a plain checkpoint and its side file."""

import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optim.prune.plan import plan
from optim.prune.pruner import Plan, Progress, Solved
from optim.recipes.build import to_yaml
from optim.runtime.sparsity.side_file import SIDE, write_side
from optim.runtime.storage.card import Card, card_of
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.manifest import Calibration, Cost, Manifest, Sparsity, made_here
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.storage.tensors import INDEX, SINGLES
from optim.runtime.storage.workspace import (
    Prove,
    Workspace,
    identity,
    index_of,
    shards_in,
    shards_of,
    source_of,
)
from optim.runtime.system.hashes import file_sha256, tensor_sha256, tokens_sha256
from optim.runtime.text.windows import described, windows_for

__all__ = ["Report", "plan", "prune"]


@dataclass(frozen=True, slots=True)
class Report:
    """What was made: for the screen and `--json`."""

    output: str
    method: str
    side_bytes: int
    seconds: float
    peak_memory_bytes: int
    resumed: bool
    blocks: list[dict[str, Any]]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """A plain dictionary."""
        return asdict(self)


def prune(
    made: Plan, progress: Progress, windows: Tensor | None = None, prove: Prove | None = None
) -> Report:
    """Carry out a plan; `windows` int64 `[n, length]` stand in for the recipe's calibration, and
    `prove` measures the result before it gets its name.

    Weights that a killed run has copied are not copied again. Raises OptimError: 2 for input that
    turns out to be bad, 4 where the machine gave out.
    """
    start = time.monotonic()
    assert made.method.solve is not None
    if windows is None:
        windows = windows_for(made.recipe.calibration, made.checkpoint.tokenizer())
    recipe = made.recipe.model_dump(mode="json", exclude={"model", "output"})
    what = identity(made.checkpoint, recipe, tokens_sha256(windows))
    workspace = Workspace(made.output, what, made.force, made.checkpoint)
    with workspace:
        with torch.inference_mode(), tempfile.TemporaryDirectory(dir=workspace.folder) as folder:
            found = made.method.solve(made, windows, Path(folder), progress)
            _copy_weights(made.checkpoint, workspace)
        side_bytes = _finish(made, workspace, windows, found)
        cost = Cost.since(start)
        workspace.publish(prove, cost)
    return Report(
        output=str(made.output),
        method=made.recipe.prune.method if made.recipe.prune else "",
        side_bytes=side_bytes,
        seconds=cost.seconds,
        peak_memory_bytes=cost.peak_memory_bytes,
        resumed=workspace.resumed,
        blocks=found.blocks,
        notes=[*made.notes, *found.notes],
    )


def _copy_weights(checkpoint: Checkpoint, workspace: Workspace) -> None:
    """Write the weights as they are, under their published names; skips journalled shards."""
    groups = list(shards_of(checkpoint.tensors))
    for k in range(len(workspace.done), len(groups)):
        tensors = {checkpoint.disk_name(name): checkpoint.read(name) for name in groups[k]}
        name = f"model-{k + 1:05d}-of-{len(groups):05d}.safetensors"
        record = workspace.write_shard(name, tensors)
        record["originals"] = {key: tensor_sha256(value) for key, value in tensors.items()}
        workspace.commit(record)


def _finish(made: Plan, workspace: Workspace, windows: Tensor, found: Solved) -> int:
    """The small files and the side file; returns the bytes of the latter."""
    config = dict(made.checkpoint.text_config)
    config["architectures"] = [type(made.walk.model).__name__]
    workspace.write_text("config.json", json.dumps(config, indent=2) + "\n")
    if not workspace.join(SINGLES[0]):
        workspace.write_text(INDEX, index_of(workspace.done) + "\n")
    made.checkpoint.write_sidecars(workspace.files)
    assert made.recipe.prune is not None
    options = made.recipe.prune.model_dump(mode="json", exclude={"method"})
    model = open_checkpoint(str(workspace.files)).fingerprint()
    side = workspace.files / SIDE
    write_side(side, made.recipe.prune.method, options, model, found.tensors)
    side_bytes = side.stat().st_size
    workspace.write_manifest(_manifest(made, workspace, windows, found))
    recipe = made.recipe.model_copy(update={"output": None})
    workspace.write_text("recipe.yaml", to_yaml(recipe))
    workspace.write_text("README.md", _card(made))
    return side_bytes


def _manifest(made: Plan, workspace: Workspace, windows: Tensor, found: Solved) -> Manifest:
    records, side = workspace.done, workspace.files / SIDE
    return Manifest(
        made=made_here(),
        source=source_of(made.checkpoint),
        recipe=made.recipe.model_dump(mode="json", exclude={"output"}, exclude_none=True),
        calibration=Calibration(**described(windows, made.checkpoint.tokenizer())),
        sparsity=Sparsity(sizes=made.sizes, blocks=found.blocks),
        notes=[*made.notes, *found.notes],
        shards=shards_in(records) | {SIDE: file_sha256(side)},
        original_sha256={k: v for record in records for k, v in record["originals"].items()},
        side_bytes=side.stat().st_size,
    )


def _card(made: Plan) -> str:
    about = f"""The weights of {made.checkpoint.name} as they are, and `{SIDE}`, which tells
`optim run` what it may skip. Everything else reads the folder as the plain model."""
    plain = "transformers" if made.checkpoint.quantization is None else "compressed-tensors"
    recipe = to_yaml(made.recipe.model_copy(update={"output": None}))
    again = "optim prune --recipe recipe.yaml"
    tags = ("optim", "sparsity")
    card = Card(made.output.name, about, tags, ("optim", plain), "", again, recipe)
    return card_of(card, made.checkpoint)
