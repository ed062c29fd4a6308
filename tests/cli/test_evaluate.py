"""`optim eval`: the table, the JSON, and the check that exits 3. The measuring is a stand-in."""

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

import optim.cli
from optim.cli import ui

Captured = pytest.CaptureFixture[str]

ALONE = {"perplexity": 12.5, "tokens": 2046, "windows": 2, "window": 1024, "begin": []}
COMPARED = ALONE | {
    "base_perplexity": 12.0,
    "ppl_ratio": 12.5 / 12.0,
    "delta_nll": 0.0408,
    "delta_nll_error": 0.002,
    "kl": 0.05,
    "kl_error": 0.003,
    "same_top": 0.91,
}


class Measuring:
    """Stands in for optim.runtime.measure.quality."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}
        self.ratio: float = COMPARED["ppl_ratio"]

    def evaluate(self, source: str, *, progress: ui.Step, **asked: Any) -> SimpleNamespace:
        self.asked = {"source": source, **asked}
        found = COMPARED | {"ppl_ratio": self.ratio} if asked["against"] else ALONE
        return SimpleNamespace(as_dict=lambda: found)


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Measuring:
    made = Measuring()
    monkeypatch.setitem(sys.modules, "optim.runtime.measure.quality", made)  # type: ignore[arg-type]
    monkeypatch.setattr(ui.notes, "quiet", False)
    return made


def optim_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["optim", "eval", *arguments])
    return optim.cli.main()


def test_flags_reach_the_measuring(measuring: Measuring, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "--against demo --text a.txt --window 64 --max-windows 3 --device cpu --threads 2"
    flags += " --text-column body"
    assert optim_main(monkeypatch, "out", *flags.split()) == 0
    assert measuring.asked == {
        "source": "out",
        "against": "demo",
        "text": "a.txt",
        "text_column": "body",
        "window": 64,
        "max_windows": 3,
        "device": "cpu",
        "threads": 2,
    }


def test_the_table(measuring: Measuring, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    assert optim_main(monkeypatch, "out", "--against", "demo") == 0
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines() if line.strip()]
    assert lines[0] == "model perplexity change KL"
    assert lines[2:] == [
        "demo (base) 12.000",
        "out 12.500 +4.17% 0.0500 ± 0.0030",
        "nll a token +0.0408 ± 0.0020 · same likeliest token 91.0%",
        "2 windows of 1024 tokens from builtin:eval",
    ]


def test_one_window_has_no_error_of_its_mean(capsys: Captured) -> None:
    import torch

    from optim.cli.evaluate import _show
    from optim.cli.options import Evaluating
    from optim.runtime.measure.quality import _standard_error

    assert _standard_error(torch.tensor([0.5])) is None
    found = COMPARED | {"windows": 1, "kl_error": None, "delta_nll_error": None}
    _show("out", Evaluating(against="demo", text="a.txt", window=64), found)
    out = capsys.readouterr().out
    assert "±" not in out and "0.0500" in out
    assert "1 window of 64 tokens from a.txt" in out


def test_json(measuring: Measuring, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    assert optim_main(monkeypatch, "out", "--json") == 0
    assert json.loads(capsys.readouterr().out) == ALONE


@pytest.mark.parametrize(
    ("ratio", "allowed", "code"),
    [(1.02, "0.03", 0), (1.02, "0.01", 3), (0.99, "0", 0), (float("nan"), "9", 3)],
)
def test_a_rise_beyond_the_limit_exits_3(
    measuring: Measuring,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
    ratio: float,
    allowed: str,
    code: int,
) -> None:
    measuring.ratio = ratio
    flags = ("--against", "demo", "--max-ppl-increase", allowed, "--json")
    assert optim_main(monkeypatch, "out", *flags) == code
    out, err = capsys.readouterr()
    assert json.loads(out)["kl"] == 0.05  # the result is printed before the check fails
    assert ("error: perplexity rose by" in err) == (code == 3)


def test_the_limit_needs_a_base(
    measuring: Measuring, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    assert optim_main(monkeypatch, "out", "--max-ppl-increase", "0.1") == 2
    assert measuring.asked == {}
    assert capsys.readouterr().err == (
        "error: --max-ppl-increase needs a model to compare with\n"
        "  fix: add --against BASE, the model it was made from\n"
    )


def test_a_begin_token_is_said(
    measuring: Measuring, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setitem(ALONE, "begin", [2])
    assert optim_main(monkeypatch, "out") == 0
    assert "builtin:eval, each after BOS (2)" in capsys.readouterr().out
