"""The loop: the student learns from its teacher, step after step, and can be stopped at any.

A step draws `batch` windows, in an order that is a function of the seed alone, sums the losses of
losses.py over them and takes one AdamW step. Every `save_every` steps the moving weights, AdamW's
moments and the history go to one file that replaces the last; a run that starts from it ends with
the weights of a run that was never stopped (on a CPU with as many threads: to the bit).
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optim.prune.prosparse.losses import kl_divergence, next_token_loss, square_head
from optim.prune.prosparse.relu import watched
from optim.prune.prosparse.schedule import Schedule, learning_rate
from optim.prune.prosparse.student import Student
from optim.recipes.errors import MACHINE, OptimError
from optim.recipes.schema import ProSparse
from optim.runtime.system.team import Team

BETAS, CLIP = (0.9, 0.95), 1.0  # AdamW's, and the largest norm of a gradient

BLEND = 0.5  # of stage 0 swaps the activation, the rest lets it settle


@dataclass(frozen=True, slots=True)
class Point:
    """One step of the history. `zeros`: share of zeros in x1, a value a block."""

    step: int
    stage: int
    relu_share: float
    l1_weight: float
    loss: float
    kl: float
    square_head: float
    l1: float
    zeros: tuple[float, ...]

    @property
    def sparsity(self) -> float:
        """Mean share of zeros over the blocks."""
        return sum(self.zeros) / len(self.zeros)


Report = Callable[[Point, int], None]
"""Called after each step with its point and the steps in all."""


@dataclass(slots=True)
class Job:
    """All that a run of training is a function of, and where it keeps its state."""

    student: Student
    teacher: Any
    windows: Tensor
    section: ProSparse
    seed: int
    state: Path
    team: Team
    device: torch.device

    @property
    def schedule(self) -> Schedule:
        """The recipe's schedule in steps."""
        s = self.section
        swap = max(1, round(s.substitution * s.steps)) if s.l1 else s.steps
        return Schedule(s.steps, swap, max(1, round(BLEND * swap)), s.l1)

    @property
    def teacher_blocks(self) -> nn.ModuleList:
        """The teacher's decoder blocks."""
        blocks = self.teacher.get_submodule(self.student.prefix)
        assert isinstance(blocks, nn.ModuleList)
        return blocks


def train(job: Job, report: Report) -> list[Point]:
    """Train from the last saved state, or from the start; returns the whole history.

    Raises OptimError: 1 where the loss is no longer a number (the last good state is kept),
    4 where a state cannot be written.
    """
    moving = job.student.moving
    optimizer = torch.optim.AdamW(
        moving.values(), lr=job.section.lr, betas=BETAS, weight_decay=0.0, fused=True
    )
    history = _load(job, optimizer)
    for step in range(len(history), job.section.steps):
        history.append(_step(job, optimizer, step))
        if not math.isfinite(history[-1].loss):
            raise _diverged(history, job)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if done % job.section.save_every == 0 or done == job.section.steps:
            _save(job, optimizer, history)
        report(history[-1], job.section.steps)
    set_step(job.student, job.schedule, job.section.steps)
    return history


def set_step(student: Student, schedule: Schedule, step: int) -> None:
    """Give every block the activation of `step`."""
    for activation in student.swapped:
        activation.share = schedule.relu_share(step)


def batch_rows(step: int, batch: int, count: int, seed: int) -> list[int]:
    """The windows of a step: all `count` in a new order each epoch, epochs joined end to end."""
    rows = []
    for place in range(step * batch, (step + 1) * batch):
        epoch, k = divmod(place, count)
        order = torch.Generator().manual_seed(seed + epoch)
        rows.append(int(torch.randperm(count, generator=order)[k]))
    return rows


def _step(job: Job, optimizer: torch.optim.Optimizer, step: int) -> Point:
    """Gradients of one batch, averaged over the team and clipped; the weights do not move yet."""
    section, schedule = job.section, job.schedule
    set_step(job.student, schedule, step)
    rate = learning_rate(step, section.steps, section.lr, int(section.warmup * section.steps))
    for group in optimizer.param_groups:
        group["lr"] = rate
    rows = batch_rows(step, section.batch, len(job.windows), job.seed)[
        job.team.rank :: job.team.size
    ]
    parts = [rows[i : i + section.micro_batch] for i in range(0, len(rows), section.micro_batch)]
    facts = torch.zeros(4 + len(job.student.ffns), device=job.device)
    for part in parts:
        ids = job.windows[part].to(job.device)
        facts += _losses(job, ids, schedule.l1(step), len(part) / len(rows))
    parameters = job.student.moving.values()
    job.team.average([facts, *(p.grad for p in parameters if p.grad is not None)])
    torch.nn.utils.clip_grad_norm_(parameters, CLIP)
    loss, kl, head, l1, *zeros = facts.tolist()
    stage, share, weight = schedule.stage(step), schedule.relu_share(step), schedule.l1(step)
    return Point(step, stage, share, weight, loss, kl, head, l1, tuple(zeros))


def _losses(job: Job, ids: Tensor, l1_weight: float, share: float) -> Tensor:
    """Run the windows `ids` both ways, add `share` of their gradients; the facts of a Point."""
    section = job.section
    bf16 = torch.autocast("cuda", torch.bfloat16, enabled=job.device.type == "cuda")
    with torch.no_grad(), bf16, watched(job.teacher_blocks, []) as wanted:
        targets = job.teacher(input_ids=ids, use_cache=False).logits
    with bf16, watched(job.student.blocks, job.student.ffns) as seen:
        logits = job.student.model(input_ids=ids, use_cache=False).logits
        kl = kl_divergence(targets, logits)
        head = square_head(wanted.outputs, seen.outputs).sum()
        l1 = torch.stack(seen.sizes).sum()
        loss = section.kl * kl + section.square_head * head + l1_weight * l1
        if section.labels:
            loss = loss + section.labels * next_token_loss(logits, ids)
        zeros = torch.stack(seen.zeros)
        torch.autograd.backward(loss * share)
    return torch.cat([torch.stack([loss, kl, head, l1]).detach(), zeros]) * share


def _diverged(history: Sequence[Point], job: Job) -> OptimError:
    saved = len(history) - 1 - (len(history) - 1) % job.section.save_every
    last = history[-2].loss if len(history) > 1 else None
    before = f" (it was {last:.3g} a step before)" if last is not None else ""
    kept = f"the state after step {saved} is kept in {job.state}" if saved else "nothing was saved"
    return OptimError(
        f"the loss is {history[-1].loss} at step {len(history)}{before}; {kept}",
        f"start over with --force and a smaller step: --set prune.lr={job.section.lr / 3:.1g}",
    )


def _save(job: Job, optimizer: torch.optim.Optimizer, history: list[Point]) -> None:
    if not job.team.leads:
        return
    moving = {name: p.detach() for name, p in job.student.moving.items()}
    points = [asdict(point) for point in history]
    unfinished = job.state.with_suffix(".unfinished")
    try:
        state = {"moving": moving, "optimizer": optimizer.state_dict(), "history": points}
        torch.save(state, unfinished)
        os.replace(unfinished, job.state)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise OptimError(
            f"cannot write {job.state}: {error}",
            "free some disk space and run the same command again: it goes on where it stopped",
            MACHINE,
        ) from error


def _load(job: Job, optimizer: torch.optim.Optimizer) -> list[Point]:
    """Put the saved state, if there is one, in place; its history."""
    state = None
    if job.team.leads and job.state.is_file():
        state = torch.load(job.state, map_location="cpu", weights_only=True, mmap=True)
    state = job.team.share(state)
    if state is None:
        return []
    with torch.no_grad():
        for name, parameter in job.student.moving.items():
            parameter.copy_(state["moving"][name])
    optimizer.load_state_dict(state["optimizer"])
    return [Point(**point | {"zeros": tuple(point["zeros"])}) for point in state["history"]]
