"""`optim tune` from the command line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import optim.cli

TEXT = ("--num-samples", "4", "--seq-len", "32", "--device", "cpu", "--threads", "1")


def test_tune(
    monkeypatch: pytest.MonkeyPatch,
    make_model: Callable[..., Path],
    some_text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main(arguments: list[str]) -> int:
        monkeypatch.setattr("sys.argv", ["optim", *arguments])
        return optim.cli.main()

    base, packed, out = str(make_model("llama")), str(tmp_path / "packed"), tmp_path / "out"
    assert main(["quantize", base, "-m", "rtn", "-o", packed, "--no-eval", "--quiet"]) == 0
    capsys.readouterr()
    command = ["tune", packed, "--against", base, "-o", str(out), "--calibration", str(some_text)]
    assert main([*command, *TEXT, "--epochs", "1", "--json", "--quiet"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["output"] == str(out) and len(report["kl"]) == 2
    assert json.loads((out / "optim.json").read_text())["held_back"]["kl"] == report["kl"]
    assert main(["inspect", str(out), "--verify"]) == 0
    card = (out / "README.md").read_text()
    assert "KL on held-back text" in card or "the scales are as before" in card
    assert f"optim run {out.name}" in card and "vllm serve" in card
    for wrong in (["--epochs", "0"], ["--lr", "2"]):
        assert main([*command, *TEXT, *wrong, "--force"]) == 2
        assert wrong[0] in capsys.readouterr().err


def test_tune_is_the_work_of_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["optim", "tune", "packed", "--against", "base"])
    assert optim.cli.main() == 2
    assert "tune is the work of one process" in capsys.readouterr().err
