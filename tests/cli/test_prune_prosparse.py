"""What a training shows on standard error."""

import io
from dataclasses import dataclass

import pytest
from rich.console import Console

from optim.cli import prune_prosparse, ui


@dataclass
class Point:
    """What the display reads of a step."""

    step: int
    stage: int = 0
    relu_share: float = 0.5
    l1_weight: float = 0.0
    kl: float = 1.0
    square_head: float = 2.0
    zeros: tuple[float, ...] = (0.0, 0.5, 1.0)
    sparsity: float = 0.5


def test_a_pipe_gets_a_line_every_ten_steps_and_the_last(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(file=io.StringIO(), width=120)
    monkeypatch.setattr(ui, "notes", console)
    monkeypatch.setattr(console, "quiet", False)
    with prune_prosparse.watch("prosparse") as (report, progress):
        for step in range(12):
            report(Point(step, stage=step // 6, relu_share=min(1.0, (step + 1) / 6)), 12)
        for block in range(12):
            progress(block + 1, 12)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split(" · ")[0] for line in lines] == [
        *("prosparse 10/12", "prosparse 12/12", "prosparse", "prosparse")
    ]
    assert lines[-1] == "prosparse · refit 12/12 blocks"
    assert "KL 1.000" in lines[0] and "zeros 50.0 %" in lines[0] and "λ 0" in lines[0]
    assert capsys.readouterr().out == ""  # standard output is for results


def test_a_terminal_gets_the_blocks_as_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    monkeypatch.setattr(ui, "notes", console)
    with prune_prosparse.watch("prosparse") as (report, _progress):
        report(Point(0), 4)
        report(Point(1), 4)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "▕ ▄█▏ 0 to 100 %" in shown
    assert "2/4 · stage 0, ReLU 50 % · KL 1.000 · SquareHead 2.000" in shown
