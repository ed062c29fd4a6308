"""A training as it goes on, on standard error: losses, zeros of every block, time left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from optim.cli import ui

BARS = " ▁▂▃▄▅▆▇█"
EVERY = 10  # steps a line where there is no terminal
SMOOTH = 0.9  # of the shown losses: a batch is small and its loss noisy

Report = Callable[[Any, int], None]
Progress = Callable[[int, int], None]


@contextmanager
def watch(title: str) -> Iterator[tuple[Report, Progress]]:
    """What a training calls after each step and each refitted block.

    A live display, or a line every ten steps where there is no terminal.
    """
    shown = _Shown(title)
    if ui.notes.quiet or not ui.notes.is_terminal:

        def line(point: Any, total: int) -> None:
            shown.take(point, total)
            if (point.step + 1) % EVERY == 0 or point.step + 1 == total:
                ui.note(f"{title} {' · '.join(shown.facts())}")

        def block(at: int, total: int) -> None:
            if at % EVERY == 0 or at == total:
                ui.note(f"{title} · refit {at}/{total} blocks")

        yield line, block
        return
    with Live(console=ui.notes, transient=True, refresh_per_second=4) as live:

        def draw(point: Any, total: int) -> None:
            shown.take(point, total)
            live.update(shown.picture())

        yield draw, lambda at, total: live.update(Text(f"{title} · refit {at}/{total} blocks"))


class _Shown:
    """The latest step, with losses smoothed over the last ones."""

    def __init__(self, title: str) -> None:
        self.title, self.eta = title, ui.Eta()
        self.point: Any = None
        self.total = 0
        self.kl = self.head = 0.0

    def take(self, point: Any, total: int) -> None:
        """A new step; the first one of a resumed run starts the clock."""
        if self.point is None:
            self.kl, self.head = point.kl, point.square_head
            self.eta.marks.clear()
            self.eta.marks.append((self.eta.clock(), point.step + 1))
        self.point, self.total = point, total
        self.kl = SMOOTH * self.kl + (1 - SMOOTH) * point.kl
        self.head = SMOOTH * self.head + (1 - SMOOTH) * point.square_head

    def facts(self) -> list[str]:
        """The step in words."""
        p = self.point
        swap = f"ReLU {100 * p.relu_share:.0f} %" if p.relu_share < 1 else f"λ {p.l1_weight:.3g}"
        left = self.eta.left(p.step + 1, self.total)
        return [
            f"{p.step + 1}/{self.total}",
            f"stage {p.stage}, {swap}",
            f"KL {self.kl:.3f}",
            f"SquareHead {self.head:.3f}",
            f"zeros {100 * p.sparsity:.1f} %",
            *([f"{ui.seconds(left)} left"] if left else []),
        ]

    def picture(self) -> Group:
        """Progress, losses, and the zeros of each block as a row of bars."""
        zeros = self.point.zeros
        bars = "".join(BARS[round(z * (len(BARS) - 1))] for z in zeros)
        span = f"{100 * min(zeros):.0f} to {100 * max(zeros):.0f} %"
        return Group(
            Text(f"{self.title} · {' · '.join(self.facts())}"),
            Text(f"zeros, first to last block  ▕{bars}▏ {span}"),
            ProgressBar(total=self.total, completed=self.point.step + 1),
        )
