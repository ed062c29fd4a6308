"""`optim tune`: a packed artifact with better scales and norms, in the format it had.

The integers and zero points stay. Everything is checked before any work; the training state and the
shards are kept in the workspace, so that the same command goes on where it was killed.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optim.quant.tune.student import Student
from optim.quant.tune.train import Asked, Progress, Trainer
from optim.recipes.errors import USAGE, OptimError
from optim.recipes.schema import Calibration
from optim.runtime.storage.card import Card, card_of
from optim.runtime.storage.checkpoint import Checkpoint, require_plain
from optim.runtime.storage.integers import IntegerStore
from optim.runtime.storage.manifest import Cost, Manifest, made_here, read_manifest
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.storage.origin import CARD
from optim.runtime.storage.tensors import INDEX, OWN_INDEX, OWN_SINGLE, SINGLES
from optim.runtime.storage.workspace import (
    KEPT,
    Prove,
    Workspace,
    identity,
    index_of,
    shards_in,
    shards_of,
    source_of,
)
from optim.runtime.system.devices import pick_device
from optim.runtime.system.hashes import tokens_sha256
from optim.runtime.system.output import check_output
from optim.runtime.text.windows import windows_for
from optim.runtime.walk.walk import HiddenStates, Walk

STATED = ("recipe", "calibration", "bytes", "parameters", "bits_per_weight", "modules", "blocks")
"""What the manifest of the artifact says that is still true of the tuned one."""


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was made: for the screen and `--json`. `kl` on held-back text: before, each pass."""

    output: str
    output_bytes: int
    seconds: float
    peak_memory_bytes: int
    kl: list[float]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """A plain dictionary."""
        return asdict(self)


def tune(
    source: str,
    against: str,
    output: str,
    calibration: Calibration,
    asked: Asked,
    progress: Progress,
    *,
    force: bool = False,
    device: str = "auto",
    threads: int | None = None,
    prove: Prove | None = None,
    windows: Tensor | None = None,
) -> Tuned:
    """Train the scales and norms of `source` towards the outputs of `against`.

    `windows` int64 `[n, length]` are tokens to use in place of `calibration`'s. `prove` measures
    the result before it gets its name.

    Raises OptimError: 2 for a source that has no packed linears or is of another model, 4 where
    the machine gave out (the same command goes on).
    """
    start = time.monotonic()
    if threads:
        torch.set_num_threads(threads)
    artifact, base = open_checkpoint(source), open_checkpoint(against)
    _check(artifact, base, against)
    size = sum(info.nbytes for info in artifact.tensors.values())
    check_output(Path(output), force, 3 * size, [*artifact.inputs(), *calibration.places])
    if windows is None:
        windows = windows_for(calibration, artifact.tokenizer())
    recipe = {"tune": asdict(asked), "calibration": calibration.model_dump(mode="json")}
    what = identity(artifact, recipe, tokens_sha256(windows)) | {"against": base.fingerprint()}
    workspace = Workspace(Path(output), what, force, artifact)
    with workspace:
        trained, kl = _train(artifact, base, windows, asked, workspace, device, progress)
        _write(artifact, workspace, trained)
        nbytes, notes = _finish(artifact, base, workspace, kl, recipe)
        cost = Cost.since(start)
        workspace.publish(prove, cost)
    return Tuned(output, nbytes, cost.seconds, cost.peak_memory_bytes, kl, notes)


def _check(artifact: Checkpoint, base: Checkpoint, against: str) -> None:
    """OptimError (2) unless `artifact` is a packed model of `base`."""
    require_plain(base)
    if not any(name.endswith(".weight_packed") for name in artifact.tensors):
        what = f"{artifact.source} has no packed linears whose scales could be tuned"
        raise OptimError(what, "give a folder that `optim quantize -m awq` wrote", USAGE)
    if isinstance(artifact.store, IntegerStore):
        what = f"{artifact.source} is stored in another program's form, or in blocks of GGUF"
        fix = "tune what `optim quantize -m awq` writes without --grid, then `optim export` that"
        raise OptimError(f"{what}: its scales cannot be written back", fix, USAGE)
    keys = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    other = [k for k in keys if artifact.text_config.get(k) != base.text_config.get(k)]
    if other:
        what = f"{against} is not what {artifact.source} was made from: {', '.join(other)} differ"
        fix = "give the original model: `optim tune MODEL --against ORIGINAL`"
        raise OptimError(what, fix, USAGE)


def _train(
    artifact: Checkpoint,
    base: Checkpoint,
    windows: Tensor,
    asked: Asked,
    workspace: Workspace,
    device: str,
    progress: Progress,
) -> tuple[dict[str, Tensor], list[float]]:
    """The trained tensors by name, and KL on held-back text: before, and after each pass."""
    folder = workspace.folder / KEPT
    folder.mkdir(exist_ok=True)
    place = pick_device(device)
    teacher = Walk(base, place)
    with torch.no_grad():
        progress(0, 1, "the original's outputs")
        wanted = _outputs(teacher, windows, folder / "wanted")
        student = Student(artifact, windows, folder / "embedded", place)
    trainer = Trainer(student, teacher, wanted, asked, folder / "state.pt")
    kl = trainer.run(progress)
    return dict(student.tensors()), kl


def _outputs(walk: Walk, windows: Tensor, path: Path) -> HiddenStates:
    """The last block's output for every window."""
    states = walk.embed(windows, path)
    for i in range(len(walk)):
        block = walk.block(i)
        for rows in walk.slices(states):
            states[rows] = walk.run(i, block, states[rows])
    return states


def _write(artifact: Checkpoint, workspace: Workspace, trained: dict[str, Tensor]) -> None:
    groups = list(shards_of(artifact.tensors))
    for k in range(len(workspace.done), len(groups)):
        tensors = {}
        for name in groups[k]:
            value = artifact.read(name)
            if name in trained:
                value = trained[name].to(value.dtype)
            tensors[artifact.disk_name(name)] = value.contiguous()
        name = f"model-{k + 1:05d}-of-{len(groups):05d}.safetensors"
        workspace.commit(workspace.write_shard(name, tensors))


def _finish(
    artifact: Checkpoint,
    base: Checkpoint,
    workspace: Workspace,
    kl: list[float],
    recipe: dict[str, Any],
) -> tuple[int, list[str]]:
    """The small files; returns the bytes of all tensors, and notes."""
    hidden = any((artifact.folder / name).is_file() for name in (OWN_INDEX, OWN_SINGLE))
    one = workspace.join(OWN_SINGLE if hidden else SINGLES[0])
    workspace.write_text("config.json", json.dumps(artifact.config, indent=2) + "\n")
    if hidden or not one:
        workspace.write_text(OWN_INDEX if hidden else INDEX, index_of(workspace.done) + "\n")
    artifact.write_sidecars(workspace.files)
    before = read_manifest(artifact.folder) or Manifest()
    notes = list(_notes(kl))
    stated = {k: getattr(before, k) for k in STATED if k in before.model_fields_set}
    manifest = Manifest(
        **stated,
        made=made_here(),
        source=before.source or source_of(artifact),
        held_back=recipe | {"kl": kl},
        notes=[*before.notes, *notes],
        shards=shards_in(workspace.done),
        original_sha256=before.original_sha256,
    )
    workspace.write_manifest(manifest)
    programs = ("optim",) if hidden else ("optim", "compressed-tensors", "vllm")
    about = f"{artifact.name}, its scales and norms tuned with `optim`:\n{notes[0]}."
    again = f"optim tune {artifact.name} --against {base.name}"
    settings = json.dumps(recipe, indent=2)
    card = Card(
        workspace.output.name, about, ("compressed-tensors", "optim"), programs, "", again, settings
    )
    workspace.write_text(CARD, card_of(card, base))
    return sum(s for record in workspace.done for s in record["tensors"].values()), notes


def _notes(kl: list[float]) -> Iterator[str]:
    after = len(kl) - 1
    if min(kl) < kl[0]:
        yield f"tuned: KL on held-back text {kl[0]:.4f} -> {min(kl):.4f} nats a token"
    else:
        yield f"tuning gained nothing on held-back text in {after} passes: the scales are as before"
