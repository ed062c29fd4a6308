"""`optim compare`: a row for each model, the numbers those of `optim eval`."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from optim.cli import main
from optim.runtime.measure import compare as module
from optim.runtime.measure.quality import evaluate

Make = Callable[..., Path]
Captured = pytest.CaptureFixture[str]
FEW = ("--window", "64", "--max-windows", "2", "--threads", "1", "--device", "cpu")


def run(*words: object) -> int:
    with pytest.MonkeyPatch.context() as patch, open(os.devnull) as nothing:
        patch.setattr(sys, "stdin", nothing)
        patch.setattr(sys, "argv", ["optim", *map(str, words)])
        return main()


@pytest.fixture(scope="module")
def small(make_model: Make, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same model in 8 and in 3 bits."""
    folders = []
    for bits in (8, 3):
        folder = tmp_path_factory.mktemp("small") / f"w{bits}"
        words = ("-m", "rtn", "-b", bits, "-o", folder, "--no-eval", "--quiet")
        assert run("quantize", make_model("llama"), *words) == 0
        folders.append(folder)
    return folders


@pytest.fixture(autouse=True)
def _timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own for each model takes seconds; tests/cli/test_bench.py has real ones."""
    timing = {"decode_tokens_per_second": {"median": 40.0}}
    monkeypatch.setattr(module, "measure", lambda job: {"timings": [timing]})


def test_rows_are_what_eval_measures(
    make_model: Make, small: list[Path], tmp_path: Path, capfd: Captured
) -> None:
    base, plot = make_model("llama"), tmp_path / "it.png"
    assert run("compare", base, *small, *FEW, "--json", "--plot", plot) == 0
    first, *others = json.loads(capfd.readouterr().out)["models"]
    assert first["kl"] is None and first["tokens_per_second"] == 40.0
    assert first["bits_per_weight"] == 16
    for folder, row in zip(small, others, strict=True):
        found = evaluate(str(folder), against=str(base), window=64, max_windows=2, threads=1)
        assert row["model"] == str(folder)
        assert row["kl"] == pytest.approx(found.kl) and row["perplexity"] == found.perplexity
        assert row["same_top"] == found.same_top
    assert others[0]["kl"] < others[1]["kl"] and others[0]["nbytes"] > others[1]["nbytes"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_table(make_model: Make, small: list[Path], capfd: Captured) -> None:
    assert run("compare", *small, "--against", make_model("llama"), *FEW, "--no-speed") == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if line.strip()]
    assert lines[0].split()[0] == "model" and len(lines) == 2 + 3 + 1
    assert "2 windows of 64 tokens from builtin:eval" in lines[-1]


def test_mistakes(
    make_model: Make, small: list[Path], monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    assert run("compare", small[0], small[0], *FEW) == 2
    assert "only one model" in capfd.readouterr().err
    assert run("compare", *small, "--plot", "it.pdf") == 2
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run("compare", *small, "--plot", "it.png") == 4
    assert "pip install matplotlib" in capfd.readouterr().err
