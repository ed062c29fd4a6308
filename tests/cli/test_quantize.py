"""`optim quantize`: what it hands to the work (a stand-in), and what it prints."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import optim.cli
from optim.cli import ui
from optim.recipes.schema import Recipe
from optim.runtime.storage.workspace import Prove

Captured = pytest.CaptureFixture[str]

PLAN = {
    "model": "demo-model",
    "blocks": 2,
    "source_bytes": 300_000_000,
    "output_bytes": 100_000_000,
    "peak_bytes": 600_000_000,
    "disk_bytes": 110_000_000,
    "products": 10**12,
    "calibration": "builtin:mixed · 64 x 512 tokens",
    "groups": [
        {"group": "mlp.*", "format": "4-bit g64 asym", "tensors": 6, "params": 1000, "nbytes": 500},
        {"group": "norms", "format": "bf16", "tensors": 5, "params": 0, "nbytes": 0},
    ],
    "notes": ["a note"],
    "output": "./out",
}
ESTIMATED = {"estimated_seconds": 100.0, "available_bytes": 500_000_000}
REPORT = {
    "output": "./out",
    "output_bytes": 100_000_000,
    "bits_per_weight": 5.304,
    "seconds": 178.2,
    "notes": ["block 1: rounded"],
}


PROOF = {
    **{"base_perplexity": 20.0, "perplexity": 21.0, "ppl_ratio": 1.05, "kl": 0.0312},
    **{"kl_error": 0.0021, "same_top": 0.905, "windows": 4, "window": 512, "text": "builtin:eval"},
}


class Work:
    """Stands in for optim.quant.run and keeps what it was asked to do."""

    def __init__(self) -> None:
        self.planned: list[tuple[Recipe, dict[str, Any]]] = []
        self.done = 0
        self.stopped = False

    def plan(self, recipe: Recipe, **how: Any) -> SimpleNamespace:
        self.planned.append((recipe, how))
        return SimpleNamespace(as_dict=lambda: PLAN, check_text=lambda: None)

    def assist(self, _plan: SimpleNamespace) -> None:
        raise AssertionError("this is the only process, so it leads")

    def quantize(
        self, _plan: SimpleNamespace, progress: ui.Step, *, prove: Prove | None
    ) -> SimpleNamespace:
        self.done += 1
        progress(2, 2, "block 1")
        if self.stopped:
            raise KeyboardInterrupt
        assert prove is not None
        prove(Path("out.partial/artifact"))
        return SimpleNamespace(as_dict=lambda: REPORT)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    made = Work()
    monkeypatch.setitem(sys.modules, "optim.quant.run", made)  # type: ignore[arg-type]
    monkeypatch.setattr("optim.runtime.measure.proof.prove", lambda *_, **__: PROOF)
    monkeypatch.setattr("optim.runtime.engine.load.why_not", lambda _: None)
    monkeypatch.setattr("optim.cli.quantize._estimated", lambda *_: ESTIMATED)
    monkeypatch.setattr(ui.notes, "quiet", False)
    return made


def optim_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["optim", "quantize", *arguments])
    return optim.cli.main()


def test_a_run_reports_and_names_the_next_command(
    work: Work, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    arguments = ("demo", "--force", "--device", "cpu", "--threads", "2", "--trust-remote-code")
    assert optim_main(monkeypatch, *arguments) == 0
    ((recipe, how),) = work.planned
    assert (recipe.model, recipe.quantize.method) == ("demo", "awq")
    assert how == {"force": True, "device": "cpu", "threads": 2, "trust_remote_code": True}
    out, err = capsys.readouterr()
    assert out == ""
    first, *rest = err.splitlines()
    assert first.startswith("awq 2/2 · block 1")
    assert rest == [
        "perplexity 20.000 -> 21.000 (+5.00%) · KL 0.0312 ± 0.0021 · same likeliest token 90.5%"
        " · 4 x 512 tokens of builtin:eval",
        "block 1: rounded",
        "✓ ./out · 100 MB · 5.30 bits/weight · 2m58s",
        "  next: optim run ./out",
    ]


def test_ctrl_c_exits_130_and_says_how_to_go_on(
    work: Work, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    work.stopped = True
    assert optim_main(monkeypatch, "demo") == 130
    err = capsys.readouterr().err
    assert "\nstopped; the same command goes on where it was\n" in err
    assert "Traceback" not in err and "✓" not in err


def test_dry_run_prints_the_plan_and_does_nothing(
    work: Work, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    assert optim_main(monkeypatch, "demo", "--dry-run") == 0
    assert work.done == 0
    out, err = capsys.readouterr()
    lines = [" ".join(line.split()) for line in out.splitlines() if line.strip()]
    assert lines[0] == "demo-model · 2 blocks · 300 MB"
    assert lines[1] == "group format tensors params bits/w size"
    assert lines[3:] == [
        "mlp.* 4-bit g64 asym 6 1.00 k 4.00 500 B",
        "norms bf16 5 0 0.00 0 B",
        "total 11 1.00 k 4.00 500 B",
        "output 100 MB (3.0x smaller) · peak memory about 600 MB of 500 MB free: too little"
        " · disk 110 MB",
        "calibration builtin:mixed · 64 x 512 tokens",
        "time about 1m40s, an estimate: its matrix products at this moment's speed",
    ]
    assert err == "a note\nnothing was written; the output would be ./out\n"


@pytest.mark.parametrize(
    ("flags", "found"), [((), REPORT), (("--dry-run",), PLAN | ESTIMATED | {"replaces": None})]
)
def test_json_is_all_of_standard_output(
    work: Work,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
    flags: tuple[str, ...],
    found: dict[str, Any],
) -> None:
    assert optim_main(monkeypatch, "demo", "--json", "--quiet", *flags) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == found | ({} if flags else {"evaluation": PROOF})
    assert err == ""
