"""`optim prune -m prosparse`: a ReLU model by training, written as a plain checkpoint.

ProSparse (arXiv 2402.13516) swaps the activation of each gated feed-forward for ReLU, trains with
a growing L1 penalty on x1 = relu(gate) * up, and lastly raises ReLU's threshold. Here the original
model is the teacher, so that some hundred thousand tokens go far; what they cannot do is what the
paper's tens of billions do. See schedule.py, losses.py and train.py.
"""

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optim.prune.prosparse import held_back
from optim.prune.prosparse.checkpoint import write
from optim.prune.prosparse.refit import Progress, refit
from optim.prune.prosparse.relu import activation_keys, feed_forwards, recompute
from optim.prune.prosparse.student import load_student, load_teacher
from optim.prune.prosparse.train import Job, Point, Report, train
from optim.prune.pruner import Plan
from optim.recipes.errors import MACHINE, USAGE, OptimError
from optim.recipes.schema import ProSparse
from optim.recipes.units import sizes_apart
from optim.runtime.storage.checkpoint import require_plain
from optim.runtime.storage.workspace import Prove, Workspace, identity
from optim.runtime.system.hashes import text_sha256, tokens_sha256
from optim.runtime.system.memory import reuse_memory
from optim.runtime.system.team import Team, join
from optim.runtime.text.windows import windows_for

LOGIT_COPIES = 6  # logits, odds and gradients that a pass holds at once


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
    """Raise OptimError for models that cannot be trained so (2), the held-back text (2), disk (4).

    Those are quantized models, ReLU models, and all without one gated feed-forward in each block.
    """
    require_plain(made.checkpoint)
    feed_forwards(made.walk.blocks, made.checkpoint.name)
    config = made.checkpoint.hf_config()
    if all(getattr(config, key) == "relu" for key in activation_keys(config)):
        fix = "skip its zeros as they are: -m relu-exact"
        raise OptimError(f"{made.checkpoint.name} is a ReLU model already", fix, USAGE)
    if made.recipe.calibration.dataset == held_back.HELD_BACK[0]:
        fix = "train on another text, such as builtin:mixed"
        raise OptimError(f"{held_back.HELD_BACK[0]} is what the result is measured on", fix, USAGE)

    need, place = needs(made)["disk"], made.output.absolute().parent
    free = shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free
    if free < need:
        needs_, has = sizes_apart(need, free)
        what = f"training takes {needs_} of disk, and {has} are free"
        raise OptimError(what, "choose another -o/--output", MACHINE)


def needs(made: Plan) -> dict[str, int]:
    """Bytes: `disk` of two states and the model, `memory` of both models, AdamW and one pass."""
    section, tensors = _section(made), made.checkpoint.tensors.values()
    ffns = feed_forwards(made.walk.blocks, made.checkpoint.name)
    inside = sum(p.numel() for ffn in ffns for p in ffn.parameters())
    every = sum(math.prod(info.shape) for info in tensors)
    moving = {"ffn": inside, "full": every, "lora": section.rank * inside // made.neurons}
    count, width = moving[section.train], 2 if made.walk.device.type == "cuda" else 4
    tokens = section.micro_batch * made.recipe.calibration.seq_len
    config = made.checkpoint.text_config
    logits = 4 * tokens * int(config.get("vocab_size", 0)) * LOGIT_COPIES
    inner = 4 * tokens * len(ffns) * (8 * made.neurons + 16 * int(config.get("hidden_size", 0)))
    return {
        "disk": 24 * count + sum(info.nbytes for info in tensors),
        "memory": 2 * width * every + 16 * count + logits + inner,
    }


def prune(
    made: Plan,
    report: Report,
    progress: Progress = lambda at, total: None,
    windows: Tensor | None = None,
    prove: Prove | None = None,
) -> Outcome:
    """Train, refit and write; the same command goes on with a run that was stopped.

    `report` hears of each step, `progress` of each refitted block. `windows` int64 `[n, length]`
    stand in for the recipe's text, and `prove` measures the result before it gets its name. Raises
    OptimError: 1 where the loss diverges (the last good state is kept), 2 for bad input, 4 where
    the machine gave out.
    """
    start = time.monotonic()
    check(made)
    if windows is None:
        windows = windows_for(made.recipe.calibration, made.checkpoint.tokenizer())
    team = join(made.walk.device)
    _check_batch(_section(made), team)
    recipe = made.recipe.model_dump(mode="json", exclude={"model", "output"})
    what = identity(made.checkpoint, recipe, tokens_sha256(windows))
    what["processes"] = team.size
    state = _state_file(made, what)
    workspace = None
    try:
        if team.leads:
            workspace = Workspace(made.output, what, made.force, made.checkpoint)
        team.share(None)  # nobody trains before the output is known to be ours
        job = _job(made, windows, team, state)
        history = train(job, report if team.leads else lambda point, total: None)
        chosen = windows[: _section(made).refit]
        if team.leads and len(chosen):
            refit(job, chosen, progress)
        found = held_back.measure_as_stored(job, made.checkpoint)
        if workspace is not None:
            write(made, workspace, windows, job.student, history, found)
        seconds = time.monotonic() - start
        if workspace is not None:
            workspace.publish(prove)
    except BaseException:
        if workspace is not None:
            (workspace.close if state.is_file() else workspace.discard)()
        raise
    finally:
        team.leave()
    return _outcome(made, history, found, seconds)


def _section(made: Plan) -> ProSparse:
    assert isinstance(made.recipe.prune, ProSparse)
    return made.recipe.prune


def _check_batch(section: ProSparse, team: Team) -> None:
    if section.batch % (section.micro_batch * team.size):
        raise OptimError(
            f"a batch of {section.batch} windows cannot be divided among {team.size} processes, "
            f"{section.micro_batch} at a time",
            f"--set prune.batch={section.micro_batch * team.size} or a multiple",
            USAGE,
        )


def _state_file(made: Plan, what: dict[str, Any]) -> Path:
    """Where this run keeps its state; a run of something else keeps its own under another name."""
    digest = text_sha256(json.dumps(what, sort_keys=True))
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


def _outcome(made: Plan, history: list[Point], found: dict[str, Any], seconds: float) -> Outcome:
    blocks = [{"zeros": zeros} for zeros in found["zeros"]]
    notes = list(made.notes)
    if not math.isfinite(found["ppl_ratio"]) or found["ppl_ratio"] > 2:
        ratio = found["ppl_ratio"]
        notes.append(f"the model is {ratio:.2f}x the original's perplexity: train for longer")
    return Outcome(
        output=str(made.output),
        method="prosparse",
        seconds=seconds,
        steps=len(history),
        held_back=found,
        blocks=blocks,
        notes=notes,
    )
