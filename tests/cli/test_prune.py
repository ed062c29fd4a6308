"""`optim prune`: flags are recipe keys; plans, refusals and results on the terminal."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import optim.cli
from optim.recipes.build import build_recipe, to_yaml

Captured = pytest.CaptureFixture[str]
Run = Callable[..., tuple[int, str, str]]
MakeModel = Callable[..., Path]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path) -> Run:
    """run(*arguments) -> exit code, standard output, standard error; in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["optim", *arguments])
        code = optim.cli.main()
        return code, *capsys.readouterr()

    return call


FLAGS = {
    "--sparsity 0.4": "prune.sparsity=0.4",
    "--only down": "prune.only=down",
    "--allocation uniform": "prune.allocation=uniform",
    "-m coreinfer --keep 0.5": "prune={method: coreinfer, keep: 0.5}",
    "-m coreinfer --score paper": "prune={method: coreinfer, score: paper}",
    "-m coreinfer --no-prior": "prune={method: coreinfer, prior: false}",
    "-m coreinfer --budget uniform": "prune={method: coreinfer, budget: uniform}",
    "-m coreinfer --guide similarity": "prune={method: coreinfer, guide: similarity}",
    "-m coreinfer --clusters 3": "prune={method: coreinfer, clusters: 3}",
    "-m coreinfer --refresh 64": "prune={method: coreinfer, refresh: 64}",
    "-m coreinfer --max-kl 0.1": "prune={method: coreinfer, max_kl: 0.1}",
    "-m relu-exact": "prune={method: relu-exact}",
    "-o out": "output=out",
    "--calibration notes.txt": "calibration.dataset=notes.txt",
}


@pytest.mark.parametrize(("flag", "key"), FLAGS.items())
def test_a_flag_is_a_recipe_key(run: Run, make_model: MakeModel, flag: str, key: str) -> None:
    model = str(make_model("llama"))
    code, out, _ = run("prune", model, *flag.split(), "--print-recipe")
    assert code == 0
    start = {"model": model}
    if not key.startswith("prune={"):
        start["prune.method"] = "threshold"
    assert out == to_yaml(build_recipe(None, start, [key]))


def test_a_relu_model_is_pruned_exactly_by_itself(run: Run, make_model: MakeModel) -> None:
    code, out, err = run("prune", str(make_model("opt")), "--print-recipe")
    assert code == 0 and "method: relu-exact" in out and "ReLU" in err


def test_prune_inspect_eval_and_verify(run: Run, make_model: MakeModel, some_text: Path) -> None:
    model = str(make_model("llama", torch.float32))
    text = ("--calibration", str(some_text), "--num-samples", "4", "--seq-len", "32")
    code, _, err = run("prune", model, "--sparsity", "0.5", *text, "-o", "out")
    assert code == 0 and "next: optim run out" in err
    code, out, _ = run("inspect", "out", "--verify")
    assert code == 0 and "method threshold, sparsity 0.5" in out and "verified" in out
    code, out, _ = run(
        "eval", "out", "--against", model, "--text", str(some_text), "--window", "64"
    )
    assert code == 0 and "read densely and not measured" in out
    found = run("eval", "out", "--text", str(some_text), "--window", "64", "--json", "--quiet")[1]
    measured = json.loads(found)
    assert 0.3 < measured["read"] < 0.7 and measured["prompt"] == 32
    assert set(measured["skipped"][0]["token"]) == {"qkv", "out", "up", "down"}


def test_a_dry_run_writes_nothing(run: Run, make_model: MakeModel, tmp_path: Path) -> None:
    code, out, err = run("prune", str(make_model("llama")), "--dry-run")
    assert code == 0 and "96 neurons each" in out and "nothing was written" in err
    assert not list(tmp_path.iterdir())


def test_what_is_out_of_range_is_said_at_once(run: Run) -> None:
    assert run("prune", "demo", "-m", "coreinfer", "--keep", "0", "--clusters", "-1") == (
        2,
        "",
        "error: the command line is not a valid recipe (2 problems)\n"
        "  --clusters: prune.clusters: must be greater than or equal to 0 (got -1)\n"
        "  --keep: prune.keep: must be greater than 0 (got 0.0)\n",
    )
