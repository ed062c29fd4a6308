"""What ends a compression: a measurement in manifest, card and report, which can be left out."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optim.cli import main
from optim.runtime.measure import proof
from optim.runtime.measure.quality import evaluate

Make = Callable[..., Path]
TEXT = ("--num-samples", "2", "--seq-len", "16", "--device", "cpu", "--threads", "1")
COMMANDS = {"quantize": ("-m", "rtn", *TEXT), "prune": ("-m", "threshold", *TEXT)}


def run(*words: object) -> int:
    with pytest.MonkeyPatch.context() as patch, open(os.devnull) as nothing:
        patch.setattr(sys, "stdin", nothing)
        patch.setattr(sys, "argv", ["optim", *map(str, words)])
        return main()


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "optim.json").read_text())
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_a_compression_ends_with_what_it_cost(
    command: str, make_model: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, made = make_model("llama"), tmp_path / "out"
    assert run(command, source, *COMMANDS[command], "-o", made, "--json") == 0
    out, err = capfd.readouterr()
    kept = manifest(made)["evaluation"]
    assert json.loads(out)["evaluation"] == kept
    assert kept["against"] == str(source) and kept["text"] == proof.TEXT
    assert (kept["windows"], kept["window"]) == (proof.WINDOWS, 128)  # what the model can read
    assert kept["kl"] > 0 and kept["kl_error"] > 0 and 0 <= kept["same_top"] <= 1
    assert f"KL {kept['kl']:.4f} ± {kept['kl_error']:.4f}" in err
    assert f"| {kept['kl']:.4f} |" in (made / "README.md").read_text()
    # The same command that measures anything finds the same.
    found = evaluate(
        str(made), against=str(source), window=128, max_windows=proof.WINDOWS, threads=1
    )
    assert found.kl == pytest.approx(kept["kl"], rel=1e-6)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_eval_leaves_it_out(command: str, make_model: Make, tmp_path: Path) -> None:
    """Seconds and memory too, so that two runs have the same bytes."""
    source, made = make_model("llama"), tmp_path / "out"
    held = []
    for _ in range(2):
        assert run(command, source, *COMMANDS[command], "-o", made, "--no-eval", "--force") == 0
        held.append({path.name: path.read_bytes() for path in made.iterdir()})
    assert not {"evaluation", "cost"} & manifest(made).keys()
    assert held[0] == held[1]


def test_seconds_and_memory_are_kept(make_model: Make, tmp_path: Path) -> None:
    made = tmp_path / "out"
    assert run("quantize", make_model("llama"), *COMMANDS["quantize"], "-o", made) == 0
    cost = manifest(made)["cost"]
    assert cost["seconds"] > 0 and cost["peak_memory_bytes"] > 10**7
    assert "\nMade in " in (made / "README.md").read_text()


def test_lossless_packing_is_proven_already(make_model: Make, tmp_path: Path) -> None:
    assert run("pack", make_model("llama"), "-o", tmp_path / "out", "--quiet") == 0
    assert "evaluation" not in manifest(tmp_path / "out")


@pytest.mark.parametrize("command", COMMANDS)
def test_stopped_in_the_measuring_the_same_command_goes_on(
    command: str,
    make_model: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Nothing has the artifact's name before; what is solved is not solved again."""

    def stopped(*_words: object, **_named: object) -> None:
        raise KeyboardInterrupt

    source, made, whole = make_model("llama"), tmp_path / "out", tmp_path / "whole"
    words = (command, source, *COMMANDS[command])
    with monkeypatch.context() as patch:
        patch.setattr(proof, "evaluate", stopped)
        assert run(*words, "-o", made) == 130
    err = capfd.readouterr().err
    assert "stopped; the same command" in err and "--no-eval" in err and "Traceback" not in err
    assert not made.exists() and (tmp_path / "out.partial").is_dir()
    assert run(*words, "-o", made, "--json") == 0
    report = json.loads(capfd.readouterr().out)
    assert report["resumed"] and report["evaluation"]["kl"] > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert run(*words, "-o", whole) == 0
    assert manifest(whole)["cost"] and "cost" not in manifest(made)  # a part only is known
    assert manifest(made) == {k: v for k, v in manifest(whole).items() if k != "cost"}


def test_stopped_in_the_measuring_it_can_be_left_out(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_words: object, **_named: object) -> None:
        raise KeyboardInterrupt

    words = ("quantize", make_model("llama"), *COMMANDS["quantize"])
    with monkeypatch.context() as patch:
        patch.setattr(proof, "evaluate", stopped)
        assert run(*words, "-o", tmp_path / "out") == 130
    held = []
    for place in (tmp_path, tmp_path / "whole"):
        assert run(*words, "-o", place / "out", "--no-eval") == 0
        held.append({path.name: path.read_bytes() for path in (place / "out").iterdir()})
    assert held[0] == held[1] and not (tmp_path / "out.partial").exists()


def test_a_model_without_tokenizer_is_not_measured(
    make_model: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "bare"
    source.mkdir()
    for path in make_model("llama").iterdir():
        if not path.name.startswith("tokenizer"):
            (source / path.name).write_bytes(path.read_bytes())
    assert run("quantize", source, *COMMANDS["quantize"], "-o", tmp_path / "out") == 0
    assert "not measured: " in capfd.readouterr().err
    assert "evaluation" not in manifest(tmp_path / "out")
