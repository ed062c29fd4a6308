"""After training: each `down_proj` in closed form, the first block first.

Gradients find a direction; what is linear in the weights can be solved. With x1 the input of a
block's `down_proj` in the student, f the teacher's output of that block, r what the student lacks,

    ΔW = argmin Σ_t ‖ΔW x1_t - r_t‖² / ‖f_t‖² + RIDGE * mean(diag G) * ‖ΔW‖²
    G  = Σ_t x1_t x1_tᵀ / ‖f_t‖²

the SquareHead error of that block, given what the refitted blocks before it hand on. x1 itself does
not change, so its zeros stay. A block whose error would not fall keeps its weights.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optim.prune.losses import square_head
from optim.prune.train import Job

Progress = Callable[[int, int], None]
"""Called with the blocks done and the blocks in all."""

RIDGE = 0.02


@dataclass(slots=True)
class Stream:
    """One model's hidden states `[n, length, hidden]` on their way through its blocks."""

    blocks: nn.ModuleList
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    states: Tensor

    def run(self, i: int, rows: slice) -> Tensor:
        """Block i's output for some rows."""
        args, kwargs = self.calls[i]
        with torch.autocast("cuda", torch.bfloat16, enabled=self.states.is_cuda):
            out: Any = self.blocks[i](self.states[rows], *args, **kwargs)
        hidden: Tensor = out[0] if isinstance(out, tuple) else out
        return hidden


@torch.no_grad()
def refit(job: Job, windows: Tensor, progress: Progress) -> list[tuple[float, float]]:
    """Solve every plain `down_proj` of the student on `windows` int64 `[n, length]`, in place.

    Returns each block's error before (the blocks in front refitted) and after.
    """
    teacher = _stream(job.teacher, job.teacher_blocks, windows.to(job.device))
    student = _stream(job.student.model, job.student.blocks, windows.to(job.device))
    errors = []
    for i, ffn in enumerate(job.student.ffns):
        down = ffn.get_submodule("down_proj")
        for rows in _slices(windows):
            teacher.states[rows] = teacher.run(i, rows)
        before = _advanced(student, i, teacher.states)
        after = before
        if isinstance(down, nn.Linear):
            old = down.weight.clone()
            down.weight += _solve(student, i, down, teacher.states)
            after = _advanced(student, i, teacher.states)
            if not after[1] < before[1]:
                down.weight.copy_(old)
                after = before
        student.states = after[0]
        errors.append((before[1], after[1]))
        progress(i + 1, len(job.student.ffns))
    return errors


def _slices(windows: Tensor) -> list[slice]:
    step = max(1, 1024 // windows.shape[1])
    return [slice(i, i + step) for i in range(0, len(windows), step)]


def _advanced(student: Stream, i: int, wanted: Tensor) -> tuple[Tensor, float]:
    """Block i's output for all windows, and its SquareHead error."""
    out = torch.cat([student.run(i, rows) for rows in _slices(student.states)])
    return out, float(square_head([wanted], [out]))


def _solve(student: Stream, i: int, down: nn.Linear, wanted: Tensor) -> Tensor:
    """ΔW `[hidden, neurons]` of block i."""
    seen: list[Tensor] = []
    handle = down.register_forward_pre_hook(
        lambda _m, inputs: seen.append(inputs[0].flatten(0, -2))
    )
    size = down.in_features
    gram = torch.zeros(size, size, device=wanted.device)
    cross = torch.zeros(size, down.out_features, device=wanted.device)
    for rows in _slices(wanted):
        out = student.run(i, rows)
        f = wanted[rows].flatten(0, 1).float()
        weight = 1 / f.square().sum(-1, keepdim=True).clamp_min(1e-12)
        x1 = seen.pop().float()
        gram += (x1 * weight).T @ x1
        cross += (x1 * weight).T @ (f - out.flatten(0, 1).float())
    handle.remove()
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, cross).T.to(down.weight.dtype)


class _Reached(Exception):
    """The first block: what comes after it is not wanted."""


def _stream(model: Any, blocks: nn.ModuleList, ids: Tensor) -> Stream:
    """Hidden states before the first block, and what the model passes to each block beside them."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    inputs: list[Tensor] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args[1:], kwargs))

    def stop(_module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0])
        raise _Reached

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    model(input_ids=ids[:1], use_cache=False)
    for handle in handles:
        handle.remove()
    stopper = blocks[0].register_forward_pre_hook(stop)
    for rows in _slices(ids):
        with suppress(_Reached):
            model(input_ids=ids[rows], use_cache=False)
    stopper.remove()
    return Stream(blocks, calls, torch.cat(inputs))
