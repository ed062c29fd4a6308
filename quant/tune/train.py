"""Train a student's scales and norms towards the original's output, and stop when it is enough.

AdamW without decay on KL(original || student), the rate falling as a cosine. Some windows are held
back: after every pass they are measured, the best state so far is kept, and after two passes that
were no better it ends. The state is saved then too: a killed run goes on from there.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from optim.quant.guide import held_back
from optim.quant.tune.student import Student
from optim.runtime.storage.workspace import disk_error
from optim.runtime.system.files import sync
from optim.runtime.walk.walk import HiddenStates, Walk

NORM_RATE = 3.0  # of the scales' rate, relative to a norm's own size
PATIENCE = 2
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Asked:
    """How to train: passes over the text, highest rate, windows of a step, seed of the order."""

    epochs: int = 3
    lr: float = 1e-3
    batch: int = 4
    seed: int = 0


@dataclass(slots=True)
class Trainer:
    """A student, its teacher (the original, its last outputs in `wanted`), and the state's file."""

    student: Student
    teacher: Walk
    wanted: HiddenStates
    asked: Asked
    path: Path

    def run(self, progress: Progress) -> list[float]:
        """Train; the student ends at its best. Returns KL on held-back text: before, and after
        each pass."""
        fitted = len(self.wanted) - held_back(len(self.wanted))
        optimizer = self._optimizer()
        measured, best = self._load(optimizer)
        if not measured:
            measured = [self._measure(fitted)]
            best = self._copy()
        steps = math.ceil(fitted / self.asked.batch)
        total = self.asked.epochs * steps
        for epoch in range(len(measured) - 1, self.asked.epochs):
            if len(measured) - 1 - measured.index(min(measured)) >= PATIENCE:
                break
            loss = 0.0
            for k, rows in enumerate(self._order(epoch, fitted)):
                at = epoch * steps + k
                loss += self._step(optimizer, rows, 0.5 * (1 + math.cos(math.pi * at / total)))
                words = f"KL {loss / (k + 1):.4f} · held back {min(measured):.4f}"
                progress(at + 1, total, words)
            measured.append(self._measure(fitted))
            if measured[-1] == min(measured):
                best = self._copy()
            self._save(optimizer, measured, best)
        self._put(best)
        return measured

    def _order(self, epoch: int, fitted: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.asked.seed + epoch)
        order = torch.randperm(fitted, generator=generator).tolist()
        step = self.asked.batch
        return [order[k : k + step] for k in range(0, fitted, step)]

    def _step(self, optimizer: torch.optim.Optimizer, rows: list[int], share: float) -> float:
        """One step on windows `rows` at `share` of the rate; their KL before it."""
        for group in optimizer.param_groups:
            group["lr"] = group["highest"] * share
        optimizer.zero_grad()
        loss = self._divergence(rows, learn=True)
        optimizer.step()
        return loss

    def _divergence(self, rows: Sequence[int], learn: bool) -> float:
        return self.student.divergence(self.teacher, self.wanted, rows, learn)

    def _measure(self, fitted: int) -> float:
        """KL on the held-back windows; of a single window, on itself."""
        first = fitted if fitted < len(self.wanted) else 0
        return self._divergence(range(first, len(self.wanted)), learn=False)

    def _optimizer(self) -> torch.optim.Optimizer:
        rate = self.asked.lr
        groups = [{"params": [x.factor for x in self.student.scales.values()], "highest": rate}]
        for norm in self.student.norms.values():
            size = float(norm.detach().abs().mean().clamp(min=1e-3))
            groups.append({"params": [norm], "highest": NORM_RATE * rate * size})
        return torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)

    def _copy(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.student.parameters().items()}

    def _put(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.student.parameters().items():
            parameter.data.copy_(values[name])

    def _save(
        self, optimizer: torch.optim.Optimizer, measured: list[float], best: dict[str, Tensor]
    ) -> None:
        state = {"now": self._copy(), "best": best, "measured": measured}
        new = self.path.with_suffix(".new")
        try:
            torch.save(state | {"optimizer": optimizer.state_dict()}, new)
            sync(new)
            os.replace(new, self.path)
        except OSError as error:
            raise disk_error(self.path, error) from error

    def _load(self, optimizer: torch.optim.Optimizer) -> tuple[list[float], dict[str, Tensor]]:
        """What an earlier run has left: what it measured, and its best."""
        if not self.path.is_file():
            return [], {}
        state = torch.load(self.path, weights_only=True)
        self._put(state["now"])
        optimizer.load_state_dict(state["optimizer"])
        return state["measured"], state["best"]
