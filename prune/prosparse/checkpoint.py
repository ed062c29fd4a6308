"""A trained ReLU model as a plain checkpoint, with the history of its training beside it.

A threshold above 0 has no field in the families' configurations: config.json says `relu`, which
transformers runs, and `hidden_act_param`, which ours does too.
"""

import json
from dataclasses import asdict
from typing import Any

from torch import Tensor

from optim.prune.prosparse.card import card
from optim.prune.prosparse.plots import plot
from optim.prune.prosparse.relu import activation_keys
from optim.prune.prosparse.student import Student
from optim.prune.prosparse.train import Point
from optim.prune.pruner import Plan
from optim.recipes.build import to_yaml
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.manifest import Calibration, Manifest, made_here
from optim.runtime.storage.tensors import INDEX, SINGLES
from optim.runtime.storage.workspace import Workspace, index_of, shards_in, shards_of, source_of
from optim.runtime.text.windows import described


def write(
    made: Plan,
    workspace: Workspace,
    windows: Tensor,
    student: Student,
    history: list[Point],
    held_back: dict[str, Any],
) -> None:
    """The checkpoint and the small files beside it."""
    records = _write_weights(made.checkpoint, workspace, student)
    manifest = Manifest(
        made=made_here(),
        source=source_of(made.checkpoint),
        recipe=made.recipe.model_dump(mode="json", exclude={"output"}, exclude_none=True),
        calibration=Calibration(**described(windows, made.checkpoint.tokenizer())),
        held_back=held_back,
        notes=list(made.notes),
        shards=shards_in(records),
    )
    lines = [json.dumps(asdict(point)) for point in history]
    workspace.write_text("config.json", json.dumps(_config(made), indent=2) + "\n")
    if len(records) > 1:
        workspace.write_text(INDEX, index_of(records) + "\n")
    workspace.write_manifest(manifest)
    workspace.write_text("recipe.yaml", to_yaml(made.recipe.model_copy(update={"output": None})))
    workspace.write_text("training.jsonl", "\n".join(lines) + "\n")
    plotted = plot(history, workspace.files)
    workspace.write_text("README.md", card(made, held_back, plotted))
    made.checkpoint.write_sidecars(workspace.files)


def _write_weights(
    checkpoint: Checkpoint, workspace: Workspace, student: Student
) -> list[dict[str, Any]]:
    """All tensors in shards: what was trained in its stored dtype, the rest as it was."""
    trained = student.weights()
    groups = list(shards_of(checkpoint.tensors))
    records = []
    for k, names in enumerate(groups):
        tensors = {}
        for name in names:
            stored = checkpoint.read(name)
            new = trained.get(_tied_to(name, checkpoint, trained), stored)
            tensors[checkpoint.disk_name(name)] = new.to("cpu", stored.dtype).contiguous()
        shard = f"model-{k + 1:05d}-of-{len(groups):05d}.safetensors"
        shard = SINGLES[0] if len(groups) == 1 else shard
        records.append(workspace.write_shard(shard, tensors))
    return records


def _tied_to(name: str, checkpoint: Checkpoint, trained: dict[str, Tensor]) -> str:
    """A head that is stored though it is tied follows the embedding."""
    tied = checkpoint.text_config.get("tie_word_embeddings") and name == "lm_head.weight"
    return next((n for n in trained if n.endswith("embed_tokens.weight")), name) if tied else name


def _config(made: Plan) -> dict[str, Any]:
    config = dict(made.checkpoint.text_config)
    config["architectures"] = [type(made.walk.model).__name__]
    config |= dict.fromkeys(activation_keys(made.checkpoint.hf_config()), "relu")
    threshold = getattr(made.recipe.prune, "threshold", 0.0)
    return config | ({"hidden_act_param": threshold} if threshold else {})
