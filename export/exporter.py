"""What an exporter is: the form of another program, what it can hold, and how it is written.

`hold` decides from headers and grids alone, so that a plan says before any work which weights keep
their integers, which are rounded and by how much. `write` then reads one weight at a time. To add a
format: a file with a class like this, a word in `recipes/writing.py`, a row in `formats.py`.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from optim.recipes.errors import USAGE, OptimError
from optim.recipes.schema import Export
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.dense_view import PlainView
from optim.runtime.storage.workspace import Prove as Prove

Progress = Callable[[int, int, str], None]
STEPS = "of a step of its grid"  # how far a carried weight may move is told in these


@dataclass(frozen=True, slots=True)
class Moved:
    """How far carried weights move: the largest in steps of their grid, the share of groups."""

    steps: float
    share: float

    def __str__(self) -> str:
        if self.steps == 0:
            return ""
        return f"at most {self.steps:.2g} {STEPS}, in {self.share:.1%} of the groups"


@dataclass(frozen=True, slots=True)
class Held:
    """What becomes of one weight of the plain model."""

    name: str
    """Its canonical name, with `.weight` or `.bias`."""
    shape: tuple[int, ...]
    source: str
    """What it is stored as now: `4-bit g64 sym`, `bf16`."""
    form: str
    """What it will be stored as, in the format's own words: `Q4_0`, `bf16`."""
    nbytes: int
    change: str = ""
    """How its value changes, in words; empty where it does not."""
    moved: Moved | None = None
    """Of integers that are carried: how far the format's own scales move them."""


class Exporter(Protocol):
    """A format of others."""

    title: str
    """What it is and who reads it, in a few words."""
    suffix: str
    """Of the output's name: `.gguf` for a file, empty for a folder."""
    keys: frozenset[str]
    """The keys of the recipe's section that it reads beside `format`."""

    def hold(self, model: PlainView, wanted: Export) -> list[Held]:
        """What becomes of each weight.

        Raises OptimError (2) for a model, or a key, that the format or its readers cannot hold.
        """

    def write(self, made: "Plan", progress: Progress, prove: Prove | None = None) -> int:
        """Write it whole or not at all; returns the bytes of the weights.

        `prove` measures what was written, before it has its name.
        """


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked export of one model."""

    checkpoint: Checkpoint
    model: PlainView
    wanted: Export
    exporter: Exporter
    output: Path
    force: bool
    held: list[Held]
    notes: tuple[str, ...]

    @property
    def output_bytes(self) -> int:
        """Bytes of the weights that will be written."""
        return sum(held.nbytes for held in self.held)

    def as_dict(self) -> dict[str, Any]:
        """For the screen and for `--json`."""
        return {
            "model": self.checkpoint.name,
            "format": self.wanted.format,
            "source_bytes": sum(path.stat().st_size for path in self.checkpoint.store.files),
            "output_bytes": self.output_bytes,
            "weights": rows(self.held),
            "notes": list(self.notes),
            "output": str(self.output),
        }


def rows(held: Iterable[Held]) -> list[dict[str, Any]]:
    """One row for each way that weights go: from what, to what, and what changes."""
    groups: dict[tuple[str, str, str], list[Held]] = {}
    for item in held:
        groups.setdefault((item.source, item.form, item.change), []).append(item)
    return [_row(*key, items) for key, items in groups.items()]


def _row(source: str, form: str, change: str, items: list[Held]) -> dict[str, Any]:
    params = [math.prod(item.shape) for item in items]
    moved = [(item.moved, count) for item, count in zip(items, params, strict=True) if item.moved]
    if moved:
        share = sum(m.share * count for m, count in moved) / sum(count for _, count in moved)
        change = str(Moved(max(m.steps for m, _ in moved), share))
    return {
        "from": source,
        "to": form,
        "change": change,
        "tensors": len(items),
        "params": sum(params),
        "nbytes": sum(item.nbytes for item in items),
    }


def refuse(model: PlainView, why: str, fix: str) -> OptimError:
    """What to raise for a model that a format cannot hold."""
    return OptimError(f"{model.checkpoint.source} cannot be exported: {why}", fix, USAGE)
