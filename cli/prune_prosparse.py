"""`optim prune -m prosparse`: the plan, the training as it goes on, what came out.

While it trains, standard error shows losses, the zeros of every block and the time left.
"""

import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from optim.cli import ui
from optim.cli.compress import only_planned, prover
from optim.cli.options import How
from optim.recipes.schema import Recipe

BARS = " ▁▂▃▄▅▆▇█"
EVERY = 10  # steps a line where there is no terminal
SMOOTH = 0.9  # of the shown losses: a batch is small and its loss noisy

Report = Callable[[Any, int], None]
Progress = Callable[[int, int], None]


def work(recipe: Recipe, how: How) -> None:
    """Plan, train and write; all processes of torchrun do this, the first one speaks."""
    from optim.prune import plan
    from optim.prune.prosparse import run as prosparse
    from optim.runtime.system.devices import own_device
    from optim.runtime.system.torchrun import leads

    ui.notes.quiet = how.quiet or not leads()

    made = plan.plan(recipe, **replace(how, device=own_device(how.device)).given)
    prosparse.check(made)
    if how.dry_run:
        made.check_text()
    if only_planned(made.as_dict() | prosparse.needs(made), how, show_plan):
        return
    proof: dict[str, Any] = {}
    with ExitStack() as shown:
        prove = prover(recipe.model, how, shown, proof)
        try:
            report, progress = shown.enter_context(watch("prosparse"))
            found = prosparse.prune(made, report, progress, prove=prove).as_dict() | proof
        except KeyboardInterrupt:
            ui.note("stopped; the same command goes on from the last saved state")
            raise
    if leads():
        show(found, recipe.model or "", how.json)


def show_plan(plan: dict[str, Any]) -> None:
    """Print what would be done."""
    section = plan["recipe"]["prune"]
    length = plan["recipe"]["calibration"]["seq_len"]
    tokens = section["steps"] * section["batch"] * length
    ui.say(f"{plan['model']} · {plan['blocks']} blocks of {plan['neurons']} neurons")
    ui.say(f"text {plan['calibration']}")
    ui.say(f"{section['steps']} steps of {section['batch']} windows: {ui.count(tokens)} tokens")
    stages = " -> ".join(f"{peak:g}" for peak in section["l1"]) or "none"
    ui.say(f"ReLU over {100 * section['substitution']:.0f} % of the steps, then lambda {stages}")
    ui.say(f"trained: {section['train']}")
    ui.say(f"memory about {ui.size(plan['memory'])} · disk {ui.size(plan['disk'])}")


def show(outcome: dict[str, Any], source: str, as_json: bool) -> None:
    """Say what came out."""
    for text in outcome["notes"]:
        ui.note(text)
    if as_json:
        ui.emit(outcome)
        return
    found = outcome["held_back"]
    rows = [
        ("perplexity", f"{found['perplexity']:.3f}", f"{found['base_perplexity']:.3f}"),
        ("ratio", f"{found['ppl_ratio']:.3f}", "1"),
        ("zeros in gate * up", f"{100 * found['sparsity']:.1f} %", "0 %"),
    ]
    ui.table(("on held-back text", "sparse", source), rows)
    facts = [outcome["output"], f"{outcome['steps']} steps", ui.seconds(outcome["seconds"])]
    typed = ["optim", "prune", outcome["output"], "-m", "relu-exact"]
    ui.done(" · ".join(facts), following=shlex.join(typed))


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
