"""`optim verify`: honest numbers hold, and each number that was changed is found."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optim.cli import main
from optim.runtime.measure.claims import TOLERANCE

Make = Callable[..., Path]
Captured = pytest.CaptureFixture[str]
TEXT = ("--num-samples", "2", "--seq-len", "16", "--device", "cpu", "--threads", "1")


def run(*words: object) -> int:
    with pytest.MonkeyPatch.context() as patch, open(os.devnull) as nothing:
        patch.setattr(sys, "stdin", nothing)
        patch.setattr(sys, "argv", ["optim", *map(str, words)])
        return main()


@pytest.fixture(scope="module")
def made(make_model: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "out"
    source = make_model("llama")
    assert run("quantize", source, "-m", "rtn", *TEXT, "-o", folder, "--quiet") == 0
    return folder


def verdicts(capfd: Captured, *words: object) -> tuple[int, dict[str, bool | None]]:
    capfd.readouterr()
    code = run("verify", *words, "--json", "--quiet", "--threads", "1")
    found = json.loads(capfd.readouterr().out)
    return code, {claim["name"]: claim["holds"] for claim in found["claims"]}


def test_every_number_of_a_fresh_artifact_holds(made: Path, capfd: Captured) -> None:
    code, found = verdicts(capfd, made)
    assert code == 0 and set(found.values()) == {True}
    assert {"files", "bytes of weights", "bits per weight", "source", "parameters"} <= found.keys()
    assert {key for key in TOLERANCE} <= found.keys()


def changed(made: Path, folder: Path, key: str, value: Any, *, inside: str | None = None) -> Path:
    shutil.copytree(made, folder)
    facts = json.loads((folder / "optim.json").read_text())
    (facts if inside is None else facts[inside])[key] = value
    (folder / "optim.json").write_text(json.dumps(facts))
    return folder


WRONG = [
    (None, "bytes", 5, "bytes of weights"),
    (None, "bits_per_weight", 3.0, "bits per weight"),
    ("source", "sha256", "0" * 64, "source"),
    ("evaluation", "kl", 0.0, "kl"),
    ("evaluation", "kl", "small", "kl"),
    ("evaluation", "perplexity", 1.5, "perplexity"),
    ("evaluation", "same_top", 1.0, "same_top"),
    ("evaluation", "text_sha256", "0" * 64, "text_sha256"),
]


@pytest.mark.parametrize(("inside", "key", "value", "claim"), WRONG)
def test_a_number_that_was_changed_is_found(
    inside: str | None,
    key: str,
    value: Any,
    claim: str,
    made: Path,
    tmp_path: Path,
    capfd: Captured,
) -> None:
    code, found = verdicts(capfd, changed(made, tmp_path / "x", key, value, inside=inside))
    assert code == 3
    assert [name for name, holds in found.items() if holds is False] == [claim]


def test_changed_weights_are_found_before_anything_is_run(
    made: Path, tmp_path: Path, capfd: Captured
) -> None:
    folder = tmp_path / "x"
    shutil.copytree(made, folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert verdicts(capfd, folder) == (3, {"files": False})


def test_another_base_is_not_the_source(made: Path, make_model: Make, capfd: Captured) -> None:
    code, found = verdicts(capfd, made, "--against", make_model("mistral"))
    assert code == 3 and found["source"] is False and found["kl"] is False
    assert found["perplexity"] is True


def test_what_cannot_be_measured_is_said(made: Path, tmp_path: Path, capfd: Captured) -> None:
    gone = changed(made, tmp_path / "a", "against", str(tmp_path / "gone"), inside="evaluation")
    code, found = verdicts(capfd, gone)
    assert code == 0 and found["kl"] is None and found["source"] and found["files"]
    lost = changed(made, tmp_path / "d", "model", str(tmp_path / "gone"), inside="recipe")
    assert verdicts(capfd, lost)[1]["source"] is None
    # A stranger's manifest makes no file of this machine be read.
    text = changed(made, tmp_path / "b", "text", "/etc/passwd", inside="evaluation")
    assert verdicts(capfd, text)[1]["perplexity"] is None
    huge = changed(made, tmp_path / "c", "window", 10**12, inside="evaluation")
    assert verdicts(capfd, huge)[1]["perplexity"] is None


def test_lossless_packing_is_decoded(make_model: Make, tmp_path: Path, capfd: Captured) -> None:
    assert run("pack", make_model("llama"), "-o", tmp_path / "out", "--quiet") == 0
    code, found = verdicts(capfd, tmp_path / "out")
    assert code == 0 and found["packed tensors"] and found["packed bits per weight"]
    assert found["source"] and found["quality"] is None


def test_a_model_without_manifest_states_nothing(make_model: Make, capfd: Captured) -> None:
    assert run("verify", make_model("llama")) == 2
    assert "states no numbers" in capfd.readouterr().err


def test_an_export_of_an_artifact(made: Path, tmp_path: Path, capfd: Captured) -> None:
    words = ("--format", "safetensors", "-o", tmp_path / "out", "--quiet")
    assert run("export", made, *words) == 0
    code, found = verdicts(capfd, tmp_path / "out")
    assert code == 0 and found["parameters"] and found["source"] and found["files"]
