"""NaN and infinity in a checkpoint: every command that computes says so in one sentence."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from optim.cli import main

Make = Callable[..., Path]
TEXT = ("--num-samples", "2", "--seq-len", "16", "--threads", "1", "--no-eval")
DAMAGES = {
    "norm": ("model.layers.1.input_layernorm.weight", float("nan")),
    "weight": ("model.layers.0.mlp.up_proj.weight", float("-inf")),
    "embedding": ("model.embed_tokens.weight", float("nan")),
    "head": ("lm_head.weight", float("inf")),
}
WALKS = {
    "rtn": ("quantize", "-m", "rtn", *TEXT, "-o", "out"),
    "prune": ("prune", "-m", "threshold", *TEXT, "-o", "out"),
    "eval": ("eval", "--window", "16", "--max-windows", "1"),
}
COMPUTE = {
    "run": ("run", "Hi", "--max-tokens", "2", "--temperature", "0", "--raw"),
    "bench": ("bench", "--prompt-tokens", "4", "--new-tokens", "2", "--repeat", "1"),
}
STEPS = [("run", "norm"), ("run", "weight"), ("run", "head"), ("bench", "weight")]


@pytest.fixture(params=DAMAGES)
def damaged(request: pytest.FixtureRequest, make_model: Make, tmp_path: Path) -> tuple[Path, str]:
    folder = tmp_path / "model"
    shutil.copytree(make_model("llama"), folder)
    name, value = DAMAGES[request.param]
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder, name


def error_of(model: Path, words: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> str:
    """The line that a command which must fail with code 2 ends in."""
    with pytest.MonkeyPatch.context() as patch, open(os.devnull) as nothing:
        patch.chdir(model.parent)
        patch.setattr(sys, "stdin", nothing)
        patch.setattr(sys, "argv", ["optim", words[0], str(model), *words[1:], "--device", "cpu"])
        assert main() == 2
    (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error: ")]
    return line


def test_what_reads_all_weights_names_the_tensor(
    damaged: tuple[Path, str], capfd: pytest.CaptureFixture[str]
) -> None:
    model, name = damaged
    for words in WALKS.values():
        if words[0] != "prune" or name != "lm_head.weight":  # which it only copies
            line = error_of(model, words, capfd)
            assert line == f"error: {name} has values that are not finite", words
    assert [path.name for path in model.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(("command", "damaged"), STEPS, indirect=["damaged"])
def test_what_computes_says_that_it_cannot(
    command: str, damaged: tuple[Path, str], capfd: pytest.CaptureFixture[str]
) -> None:
    line = error_of(damaged[0], COMPUTE[command], capfd)
    assert line == "error: what the model computes is not a finite number"
