"""The terminal: results to standard output, everything else to standard error.

No other module of `optim` prints tables, progress or errors; algorithms report through a callback.
"""

import json
import math
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from optim.recipes.errors import OptimError
from optim.recipes.units import count as count
from optim.recipes.units import seconds as seconds
from optim.recipes.units import size as size

Step = Callable[[int, int, str], None]
"""What algorithms call: steps done, steps in all, and a few words on the step."""

ETA_STEPS = 8
SECONDS_A_LINE = 5
WIDE = 160  # columns where there is no terminal, so that no name is cut

# Names and messages may come from a stranger's file. What steers a terminal is taken out of them:
# controls but tab and newline, marks that turn the direction of writing, halves of characters.
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

notes = Console(stderr=True, markup=False, highlight=False, soft_wrap=True, emoji=False)
"""Notes and progress; `notes.quiet = True` is `--quiet`. Errors are shown all the same."""


def plain(text: str) -> str:
    """`text` without characters that steer a terminal."""
    return STEERING.sub("", text)


def emit(data: Any) -> None:
    """Print one JSON document, the whole result of a command."""
    text = json.dumps(_finite(data), indent=2, ensure_ascii=False)
    print(STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text), flush=True)


def say(text: str) -> None:
    """Print a line of the result."""
    print(plain(text), flush=True)


def note(text: str, style: str = "") -> None:
    """A line for the person at the terminal, on standard error."""
    notes.print(Text(plain(text), style=style))


class Status:
    """A passing line on standard error, at a terminal only: the next one takes its place."""

    def __init__(self) -> None:
        self._shown = False

    def __call__(self, text: str = "") -> None:
        """Show `text`; without one, wipe what is shown."""
        seen = notes.is_terminal and not notes.quiet and not notes.is_dumb_terminal
        if self._shown or (text and seen):
            notes.file.write(f"\r\x1b[K{plain(text)}")
            notes.file.flush()
        self._shown = bool(text and seen)


status = Status()


def done(text: str, following: str | None = None) -> None:
    """Say that the work is done, and what to type next."""
    note(f"✓ {text}", style="green")
    if following:
        note(f"  next: {following}", style="dim")


def error(problem: OptimError) -> None:
    """Show an explained failure and its fix."""
    console = Console(stderr=True, soft_wrap=True, emoji=False)
    head, _, rest = plain(problem.message).partition("\n")
    console.print(Text.assemble(("error: ", "bold red"), head))
    if rest:
        console.print(Text(rest))
    if problem.fix:
        console.print(Text.assemble(("  fix: ", "bold"), plain(problem.fix)))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> None:
    """Print a table; the first `left` columns are words, the others numbers."""
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = WIDE
    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column, head in enumerate(heads):
        made.add_column(head, justify="left" if column < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*(Text(plain(cell)) for cell in row))
    console.print(made)


def size_table(groups: Iterable[Mapping[str, Any]]) -> None:
    """Print rows with the keys group, format, tensors, params and nbytes, and their total."""
    rows = list(groups)
    total = {key: sum(row[key] for row in rows) for key in ("tensors", "params", "nbytes")}
    cells = [_size_cells(row) for row in [*rows, {"group": "total", "format": "", **total}]]
    table(("group", "format", "tensors", "params", "bits/w", "size"), cells, left=2)


def _size_cells(row: Mapping[str, Any]) -> list[str]:
    bits = 8 * row["nbytes"] / row["params"] if row["params"] else 0.0
    return [
        row["group"],
        row["format"],
        str(row["tensors"]),
        count(row["params"]),
        f"{bits:.2f}",
        size(row["nbytes"]),
    ]


@contextmanager
def progress(title: str) -> Iterator[Step]:
    """A bar with the time left; without a terminal the last step, and one every few seconds."""
    eta = Eta()
    if notes.quiet or not notes.is_terminal:
        said = eta.clock()

        def line(at: int, total: int, text: str) -> None:
            nonlocal said
            shown, now = _line(title, at, total, text, eta), eta.clock()
            if at == total or now - said >= SECONDS_A_LINE:
                note(shown)
                said = now

        yield line
        return
    words = (TextColumn(f"{{task.{x}}}", markup=False) for x in ("description", "fields[text]"))
    columns = (next(words), BarColumn(), next(words))
    with Progress(*columns, console=notes, transient=True) as bar:
        task = bar.add_task(title, total=None, text="")

        def step(at: int, total: int, text: str) -> None:
            bar.update(task, completed=at, total=total, text=_line("", at, total, text, eta))

        yield step


def _line(title: str, at: int, total: int, text: str, eta: "Eta") -> str:
    left = eta.left(at, total)
    parts = [f"{title} {at}/{total}".strip(), plain(text), f"{seconds(left)} left" if left else ""]
    return " · ".join(part for part in parts if part)


class Eta:
    """Time left, from the pace of the last few steps."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.marks: deque[tuple[float, int]] = deque([(clock(), 0)], maxlen=ETA_STEPS + 1)

    def left(self, at: int, total: int) -> float | None:
        """Seconds until `total`, now that `at` steps are done; None while there is no pace."""
        if at != self.marks[-1][1]:
            self.marks.append((self.clock(), at))
        (begin, first), (end, last) = self.marks[0], self.marks[-1]
        return (end - begin) / (last - first) * (total - last) if last > first else None


def _finite(data: Any) -> Any:
    """JSON has no infinity and no NaN: they become null."""
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(item) for item in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
