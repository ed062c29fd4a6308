"""`optim prune -m prosparse`: a ReLU model by training, written as a plain checkpoint.

ProSparse (arXiv 2402.13516) swaps the activation of each gated feed-forward for ReLU, trains with
a growing L1 penalty on x1 = relu(gate) * up, and lastly raises ReLU's threshold. Here the original
model is the teacher, so that some hundred thousand tokens go far; what they cannot do is what the
paper's tens of billions do. See schedule.py, losses.py and train.py.

A threshold above 0 has no field in the families' configurations: config.json says `relu`, which
transformers runs, and `hidden_act_param`, which ours does too.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optim.prune.card import card
from optim.prune.plan import Plan
from optim.prune.plots import plot
from optim.prune.relu import feed_forwards, recompute, watched
from optim.prune.student import Student, load_student, load_teacher
from optim.prune.team import Team, join
from optim.prune.train import Job, Point, Report, train
from optim.recipes.build import to_yaml
from optim.recipes.errors import USAGE, OptimError
from optim.recipes.schema import ProSparse, Recipe
from optim.runtime.artifact import FORMAT_VERSION, INDEX, Workspace, index_of
from optim.runtime.checkpoint import Checkpoint, require_plain
from optim.runtime.corpus import calibration_windows, evaluation_windows, token_hash
from optim.runtime.machine import reuse_memory
from optim.runtime.verify import MANIFEST

HELD_BACK = ("builtin:eval", 512, 8)  # text, window and windows that the report is measured on
SHARD_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was made: for the screen and `--json`. `blocks`: held-back zeros of each block."""

    output: str
    method: str
    seconds: float
    steps: int
    held_back: dict[str, Any]
    blocks: list[dict[str, Any]]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """A plain dictionary."""
        return asdict(self)


def check(made: Plan) -> None:
    """Raise OptimError (2) for models that cannot be trained so, and for the held-back text.

    Those are quantized models, ReLU models, and all without one gated feed-forward in each block.
    """
    require_plain(made.checkpoint)
    feed_forwards(made.walk.blocks, made.checkpoint.name)
    config = made.checkpoint.hf_config()
    if all(getattr(config, key) == "relu" for key in _activation_keys(config)):
        fix = "skip its zeros as they are: -m relu-exact"
        raise OptimError(f"{made.checkpoint.name} is a ReLU model already", fix, USAGE)
    if made.recipe.calibration.dataset == HELD_BACK[0]:
        fix = "train on another text, such as builtin:mixed"
        raise OptimError(f"{HELD_BACK[0]} is what the result is measured on", fix, USAGE)


def prune(made: Plan, report: Report, windows: Tensor | None = None) -> Outcome:
    """Train and write; the same command goes on with a run that was stopped.

    `windows` int64 `[n, length]` stand in for the recipe's text. Raises OptimError: 1 where the
    loss diverges (the last good state is kept), 2 for bad input, 4 where the machine gave out.
    """
    start = time.monotonic()
    check(made)
    windows = _text(made) if windows is None else windows
    team = join(made.walk.device)
    _check_batch(_section(made), team)
    identity = _identity(made, windows, team)
    state = _state_file(made, identity)
    workspace = None
    try:
        if team.leads:
            workspace = Workspace(made.output, identity, made.force)
        team.share(None)  # nobody trains before the output is known to be ours
        job = _job(made, windows, team, state)
        history = train(job, report if team.leads else lambda point, total: None)
        held_back = _round_and_measure(job, made.checkpoint)
        if workspace is not None:
            _write(made, workspace, windows, job.student, history, held_back)
    except BaseException:
        if workspace is not None:
            (workspace.close if state.is_file() else workspace.discard)()
        raise
    finally:
        team.leave()
    return _outcome(made, history, held_back, time.monotonic() - start)


def _section(made: Plan) -> ProSparse:
    assert isinstance(made.recipe.prune, ProSparse)
    return made.recipe.prune


def _text(made: Plan) -> Tensor:
    options = made.recipe.calibration.model_dump()
    spec = options.pop("dataset")
    return calibration_windows(spec, made.checkpoint.tokenizer(), **options)


def _check_batch(section: ProSparse, team: Team) -> None:
    if section.batch % (section.micro_batch * team.size):
        raise OptimError(
            f"a batch of {section.batch} windows cannot be divided among {team.size} processes, "
            f"{section.micro_batch} at a time",
            f"--set prune.batch={section.micro_batch * team.size} or a multiple",
            USAGE,
        )


def _identity(made: Plan, windows: Tensor, team: Team) -> dict[str, Any]:
    return {
        "source": made.checkpoint.fingerprint(),
        "recipe": made.recipe.model_dump(mode="json", exclude={"model", "output"}),
        "calibration": token_hash(windows),
        "processes": team.size,
        "versions": {name: version(name) for name in ("optim-llm", "torch", "transformers")},
    }


def _state_file(made: Plan, identity: dict[str, Any]) -> Path:
    """Where this run keeps its state; a run of something else keeps its own under another name."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return made.output.with_name(made.output.name + ".partial") / f"state-{digest[:12]}.pt"


def _job(made: Plan, windows: Tensor, team: Team, state: Path) -> Job:
    section, device = _section(made), made.walk.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    reuse_memory()
    torch.manual_seed(made.recipe.calibration.seed)
    student = load_student(made.checkpoint, section, device, dtype)
    if section.recompute:
        recompute(student.blocks)
    return Job(
        student=student,
        teacher=load_teacher(made.checkpoint, device, dtype),
        windows=windows,
        section=section,
        seed=made.recipe.calibration.seed,
        state=state,
        team=team,
        device=device,
    )


@torch.no_grad()
def _round_and_measure(job: Job, checkpoint: Checkpoint) -> dict[str, Any]:
    """Perplexity of both models on held-back text, and the zeros of each block, as stored."""
    for name, parameter in job.student.moving.items():
        if name in checkpoint.tensors:
            parameter.copy_(parameter.to(checkpoint.tensors[name].dtype))
    for activation in job.student.swapped:
        activation.threshold = job.section.threshold
    spec, window, count = HELD_BACK
    tokenizer = checkpoint.tokenizer()
    windows = evaluation_windows(spec, tokenizer, window=window, max_windows=count)
    sums = torch.zeros(2, dtype=torch.float64)
    zeros = torch.zeros(len(job.student.ffns))
    bf16 = torch.autocast("cuda", torch.bfloat16, enabled=job.device.type == "cuda")
    for row in windows:
        ids = row[None].to(job.device)
        with bf16, watched(job.student.blocks, job.student.ffns) as seen:
            sums[0] += _nll(job.student.model, ids)
        with bf16:
            sums[1] += _nll(job.teacher, ids)
        zeros += torch.stack(seen.zeros).cpu() / len(windows)
    mine, base = (sums / len(windows)).exp().tolist()
    return {
        "text": spec,
        "windows": len(windows),
        "window": windows.shape[1],
        "perplexity": mine,
        "base_perplexity": base,
        "ppl_ratio": mine / base,
        "sparsity": float(zeros.mean()),
        "zeros": zeros.tolist(),
    }


def _nll(model: Any, ids: Tensor) -> float:
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))


def _write(
    made: Plan,
    workspace: Workspace,
    windows: Tensor,
    student: Student,
    history: list[Point],
    held_back: dict[str, Any],
) -> None:
    """The checkpoint and the small files beside it; publishes."""
    records = _write_weights(made.checkpoint, workspace, student)
    samples, length = windows.shape
    manifest = {
        "format_version": FORMAT_VERSION,
        "source": {"name": made.checkpoint.name, "sha256": made.checkpoint.fingerprint()},
        "recipe": made.recipe.model_dump(mode="json", exclude={"output"}, exclude_none=True),
        "calibration": {"samples": samples, "seq_len": length, "sha256": token_hash(windows)},
        "held_back": held_back,
        "notes": list(made.notes),
        "shards": {record["file"]: record["sha256"] for record in records},
    }
    lines = [json.dumps(asdict(point)) for point in history]
    workspace.write_text("config.json", json.dumps(_config(made), indent=2) + "\n")
    workspace.write_text(INDEX, index_of(records) + "\n")
    workspace.write_text(MANIFEST, json.dumps(manifest, indent=1) + "\n")
    workspace.write_text("recipe.yaml", to_yaml(_portable(made.recipe)))
    workspace.write_text("training.jsonl", "\n".join(lines) + "\n")
    plotted = plot(history, workspace.files)
    workspace.write_text("README.md", card(made, held_back, plotted))
    made.checkpoint.write_sidecars(workspace.files)
    workspace.publish()


def _portable(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"output": None})


def _write_weights(
    checkpoint: Checkpoint, workspace: Workspace, student: Student
) -> list[dict[str, Any]]:
    """All tensors in shards: what was trained in its stored dtype, the rest as it was."""
    trained = student.weights()
    groups = list(_groups(checkpoint))
    records = []
    for k, names in enumerate(groups):
        tensors = {}
        for name in names:
            stored = checkpoint.read(name)
            new = trained.get(_tied_to(name, checkpoint, trained), stored)
            tensors[checkpoint.disk_name(name)] = new.to("cpu", stored.dtype).contiguous()
        shard = f"model-{k + 1:05d}-of-{len(groups):05d}.safetensors"
        records.append(workspace.write_shard(shard, tensors))
    return records


def _tied_to(name: str, checkpoint: Checkpoint, trained: dict[str, Tensor]) -> str:
    """A head that is stored though it is tied follows the embedding."""
    tied = checkpoint.text_config.get("tie_word_embeddings") and name == "lm_head.weight"
    return next((n for n in trained if n.endswith("embed_tokens.weight")), name) if tied else name


def _groups(checkpoint: Checkpoint) -> Iterator[list[str]]:
    """The tensors' names in groups of about SHARD_BYTES."""
    group, size = list[str](), 0
    for name, info in checkpoint.tensors.items():
        if group and size + info.nbytes > SHARD_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += info.nbytes
    yield group


def _activation_keys(config: Any) -> list[str]:
    """How the family's configuration calls the activation (gemma: by two names)."""
    return [key for key in ("hidden_activation", "hidden_act") if hasattr(config, key)]


def _config(made: Plan) -> dict[str, Any]:
    config = dict(made.checkpoint.text_config)
    config["architectures"] = [type(made.walk.model).__name__]
    config |= dict.fromkeys(_activation_keys(made.checkpoint.hf_config()), "relu")
    threshold = _section(made).threshold
    return config | ({"hidden_act_param": threshold} if threshold else {})


def _outcome(
    made: Plan, history: list[Point], held_back: dict[str, Any], seconds: float
) -> Outcome:
    blocks = [{"zeros": zeros} for zeros in held_back["zeros"]]
    notes = list(made.notes)
    if not math.isfinite(held_back["ppl_ratio"]) or held_back["ppl_ratio"] > 2:
        ratio = held_back["ppl_ratio"]
        notes.append(f"the model is {ratio:.2f}x the original's perplexity: train for longer")
    return Outcome(
        output=str(made.output),
        method="prosparse",
        seconds=seconds,
        steps=len(history),
        held_back=held_back,
        blocks=blocks,
        notes=notes,
    )
