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

from optim.prune.prosparse.losses import square_head
from optim.prune.prosparse.train import Job

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
        errors.append(_refit_block(student, i, down, teacher.states))
        progress(i + 1, len(job.student.ffns))
    return errors


def _slices(windows: Tensor) -> list[slice]:
    step = max(1, 1024 // windows.shape[1])
    return [slice(i, i + step) for i in range(0, len(windows), step)]


def _refit_block(student: Stream, i: int, down: nn.Module, wanted: Tensor) -> tuple[float, float]:
    """Solve block i if that helps, and take the states through it; its error before and after."""
    out, delta = _solved(student, i, down, wanted)
    before = after = float(square_head([wanted], [out]))
    if delta is not None and isinstance(down, nn.Linear):
        old = down.weight.clone()
        down.weight += delta
        new = torch.cat([student.run(i, rows) for rows in _slices(wanted)])
        after = float(square_head([wanted], [new]))
        if after < before:
            out = new
        else:
            down.weight.copy_(old)
            after = before
    student.states = out
    return before, after


def _solved(
    student: Stream, i: int, down: nn.Module, wanted: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Block i's output `[n, length, hidden]`, and ΔW `[hidden, neurons]` of a plain `down_proj`."""
    seen: list[Tensor] = []
    handle = down.register_forward_pre_hook(lambda _m, args: seen.append(args[0].flatten(0, -2)))
    gram: Tensor | float = 0.0
    cross: Tensor | float = 0.0
    outputs = []
    for rows in _slices(wanted):
        outputs.append(student.run(i, rows))
        f, g = wanted[rows].flatten(0, 1).float(), outputs[-1].flatten(0, 1).float()
        x1 = seen.pop().float()
        weighted = (x1 / f.square().sum(-1, keepdim=True).clamp_min(1e-12)).T
        gram, cross = gram + weighted @ x1, cross + weighted @ (f - g)
    handle.remove()
    if not isinstance(down, nn.Linear):
        return torch.cat(outputs), None
    assert isinstance(gram, Tensor)
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.cat(outputs), torch.linalg.solve(gram, cross).T.to(down.weight.dtype)


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
