"""What users and broken files get wrong: one clear message, its code, nothing left behind."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from optim.cli import main

Captured = pytest.CaptureFixture[str]
WEIGHTS = "model.safetensors"
BROKEN = "model-00002-of-00002.safetensors"


@dataclass
class Shell:
    """`optim ...` in this process, in a folder that holds a model and a text."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: Captured

    def __call__(self, *arguments: str) -> tuple[int, str]:
        """Exit code and standard error; standard output stays empty on failure."""
        self.monkeypatch.setattr(sys, "argv", ["optim", *arguments])
        self.capsys.readouterr()
        code = main()
        out, err = self.capsys.readouterr()
        assert code == 0 or out == ""
        assert "Traceback" not in err and "unexpected" not in err
        return code, " ".join(err.split())

    def quantize(self, *more: str) -> tuple[int, str]:
        calibration = ("--calibration", "some.txt", "--num-samples", "4", "--seq-len", "32")
        return self("quantize", "model", *calibration, "--device", "cpu", "-o", "out", *more)

    def left(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()} - {"model", "some.txt"}

    def edit_config(self, **changes: Any) -> None:
        path = self.folder / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def edit_weights(self, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        tensors = load_file(self.folder / "model" / WEIGHTS)
        change(tensors)
        save_file(tensors, self.folder / "model" / WEIGHTS, {"format": "pt"})

    def split_weights(self) -> Path:
        """Two shards; returns the second."""
        model = self.folder / "model"
        tensors = load_file(model / WEIGHTS)
        second = {k: v for k, v in tensors.items() if ".layers.1." in k}
        first = {k: v for k, v in tensors.items() if k not in second}
        files = {"model-00001-of-00002.safetensors": first, BROKEN: second}
        for name, part in files.items():
            save_file(part, model / name, {"format": "pt"})
        weight_map = {key: name for name, part in files.items() for key in part}
        index = {"metadata": {}, "weight_map": weight_map}
        (model / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
        (model / WEIGHTS).unlink()
        return model / BROKEN


@pytest.fixture
def shell(
    make_model: Callable[..., Path],
    some_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> Iterator[Shell]:
    shutil.copytree(make_model("llama"), tmp_path / "model")
    shutil.copyfile(some_text, tmp_path / "some.txt")
    monkeypatch.chdir(tmp_path)
    yield Shell(tmp_path, monkeypatch, capsys)


def test_the_shell_works(shell: Shell) -> None:
    code, err = shell.quantize()
    assert (code, shell.left()) == (0, {"out"}), err


class Case(NamedTuple):
    """A command line that cannot work, and what must be said about it."""

    arguments: tuple[str, ...]
    said: tuple[str, ...]
    code: int = 2


COMMAND_LINES = {
    "group that does not divide": Case(
        ("--group-size", "128"), ("group_size 128 does not divide", "64, 96", "--group-size 32")
    ),
    "unknown data set file": Case(("--calibration", "none.txt"), ("none.txt",)),
    "calibration too short": Case(
        ("--num-samples", "5000"), ("some.txt is too short", "5000 are wanted", "--num-samples")
    ),
    "no bits like that": Case(("--bits", "5"), ("bits", "must be 2, 3, 4 or 8")),
    "pattern that matches nothing": Case(
        ("--set", "quantize.ignore=[lm_head,typo]"), ("'typo' matches none",)
    ),
    "output in a file": Case(("-o", "some.txt/out"), ("some.txt", "not a folder")),
    "model that is not there": Case(("--set", "model=nothing"), ("nothing", "folder")),
}


@pytest.mark.parametrize("name", COMMAND_LINES)
def test_command_lines(name: str, shell: Shell) -> None:
    case = COMMAND_LINES[name]
    code, err = shell.quantize(*case.arguments)
    assert code == case.code and shell.left() == set()
    for part in case.said:
        assert part in err


def test_all_problems_of_a_plan_at_once(shell: Shell) -> None:
    (shell.folder / "out").mkdir()
    code, err = shell.quantize("--group-size", "128")
    assert code == 2 and "2 problems" in err
    assert "does not divide" in err and "out exists" in err
    assert list((shell.folder / "out").iterdir()) == []


def test_output_exists(shell: Shell) -> None:
    (shell.folder / "out").mkdir()
    (shell.folder / "out" / "precious").write_text("keep")
    code, err = shell.quantize()
    assert code == 2 and "out exists" in err and "--force" in err
    assert (shell.folder / "out" / "precious").read_text() == "keep"
    assert shell.left() == {"out"}
    code, err = shell.quantize("--force")
    assert code == 2 and "precious" in err and "optim has not made it" in err
    assert (shell.folder / "out" / "precious").read_text() == "keep" and shell.left() == {"out"}
    (shell.folder / "out" / "precious").unlink()
    assert shell.quantize("--force")[0] == 0 and shell.left() == {"out"}
    assert shell.quantize()[0] == 2
    assert shell.quantize("--force", "--bits", "3")[0] == 0  # ours: it is replaced


def test_unknown_family(shell: Shell) -> None:
    shell.edit_config(model_type="frobnicate", architectures=["FrobnicateForCausalLM"])
    code, err = shell.quantize()
    assert code == 2 and "frobnicate" in err and "model_type" in err and shell.left() == set()


def test_not_a_language_model(shell: Shell) -> None:
    shell.edit_config(model_type="vit", architectures=["ViTModel"])
    code, err = shell.quantize()
    assert code == 2 and "vit" in err and shell.left() == set()


def test_already_quantized(shell: Shell) -> None:
    shell.edit_config(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32})
    code, err = shell.quantize()
    assert code == 2 and "already quantized (gptq, 4 bits)" in err and shell.left() == set()


def test_our_own_artifact_is_already_quantized(shell: Shell) -> None:
    assert shell.quantize("-m", "rtn")[0] == 0
    code, err = shell("quantize", "out", "-o", "again")
    assert code == 2 and "pack-quantized" in err and shell.left() == {"out"}


def _missing(path: Path) -> None:
    path.unlink()


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _corrupt(path: Path) -> None:
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_missing, _truncated, _corrupt, _empty])
@pytest.mark.parametrize("method", ["awq", "rtn"])
def test_damaged_shards(damage: Callable[[Path], None], method: str, shell: Shell) -> None:
    damage(shell.split_weights())
    code, err = shell.quantize("-m", method)
    assert code == 2 and BROKEN in err and shell.left() == set()


def test_a_tensor_is_missing(shell: Shell) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]

    shell.edit_weights(drop)
    code, err = shell.quantize()
    assert code == 2 and "model.layers.1.mlp.up_proj.weight" in err and shell.left() == set()


def test_a_tensor_of_another_shape(shell: Shell) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = tensors[name][:64].clone()

    shell.edit_weights(cut)
    code, err = shell.quantize()
    assert code == 2 and "model.layers.1.mlp" in err and shell.left() == set()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["awq", "rtn"])
def test_weights_that_are_not_finite(value: float, method: str, shell: Shell) -> None:
    """In the second block: the first is already done, and must be removed again."""
    name = "model.layers.1.self_attn.o_proj.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, 5] = value

    shell.edit_weights(spoil)
    code, err = shell.quantize("-m", method)
    assert code == 2 and name in err and "not finite" in err and shell.left() == set()


def test_embeddings_that_are_not_finite(shell: Shell) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"].fill_(float("nan"))

    shell.edit_weights(spoil)
    code, err = shell.quantize()
    assert code == 2 and "not finite" in err and shell.left() == set()


def test_activations_that_overflow(shell: Shell) -> None:
    def blow_up(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("gate", "up", "down"):
            tensors[f"model.layers.0.mlp.{part}_proj.weight"].mul_(1e37)

    shell.edit_weights(blow_up)
    code, err = shell.quantize()
    assert code == 2 and "not finite" in err and shell.left() == set()


def test_an_empty_calibration_file(shell: Shell) -> None:
    (shell.folder / "some.txt").write_text("")
    code, err = shell.quantize()
    assert code == 2 and "some.txt" in err and "fix" in err and shell.left() == set()


def test_bad_yaml_shows_every_problem_with_its_line(shell: Shell) -> None:
    text = "version: 1\nmodel: model\nquantize:\n  method: awq\n  bits: 5\n  grups: 3\n"
    (shell.folder / "bad.yaml").write_text(text)
    code, err = shell("quantize", "--recipe", "bad.yaml", "-o", "out")
    assert code == 2 and "5" in err and "6" in err and "grups" in err and "bits" in err
    assert shell.left() == {"bad.yaml"}
    (shell.folder / "bad.yaml").write_text("quantize: [unclosed\n")
    code, err = shell("quantize", "--recipe", "bad.yaml", "-o", "out")
    assert code == 2 and "bad.yaml" in err and shell.left() == {"bad.yaml"}


def test_a_full_disk_is_seen_up_front(shell: Shell) -> None:
    usage = shutil.disk_usage(shell.folder)._replace(free=1000)
    shell.monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    code, err = shell.quantize()
    assert code == 4 and "free disk" in err and "fix" in err and shell.left() == set()


def test_a_disk_that_fills_up_can_be_emptied_and_gone_on(shell: Shell) -> None:
    assert shell.quantize("-o", "whole")[0] == 0
    original, calls = save_file, []

    def full(tensors: Any, path: Any, **options: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, path, **options)

    shell.monkeypatch.setattr("optim.runtime.storage.workspace.save_file", full)
    code, err = shell.quantize()
    assert code == 4 and "No space left" in err and "same command" in err
    assert shell.left() == {"whole", "out.partial"}  # the finished block is kept
    assert shell.quantize()[0] == 0 and shell.left() == {"whole", "out"}
    assert len(calls) == 4  # block 0 was not done again
    for path in (shell.folder / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (shell.folder / "out" / path.name).read_bytes()


def test_a_disk_that_fills_up_at_once_leaves_nothing(shell: Shell) -> None:
    def full(tensors: Any, path: Any, **_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    shell.monkeypatch.setattr("optim.runtime.storage.workspace.save_file", full)
    code, err = shell.quantize()
    assert code == 4 and "No space left" in err and shell.left() == set()


def test_states_that_do_not_fit(shell: Shell) -> None:
    def full(self: Any, rows: slice, value: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    shell.monkeypatch.setattr("optim.runtime.walk.walk.HiddenStates.__setitem__", full)
    code, err = shell.quantize()
    assert code == 4 and "disk" in err and shell.left() == set()


def test_another_recipe_over_an_unfinished_run(shell: Shell) -> None:
    def stop(self: Any, rows: slice, value: Any) -> None:
        if self.path.name == "states-2":
            raise KeyboardInterrupt
        original(self, rows, value)

    from optim.runtime.walk.walk import HiddenStates

    original = HiddenStates.__setitem__
    shell.monkeypatch.setattr(HiddenStates, "__setitem__", stop)
    assert shell.quantize()[0] == 130 and shell.left() == {"out.partial"}
    code, err = shell.quantize("--bits", "3")
    assert code == 2 and "quantize.bits 4 -> 3" in err and shell.left() == {"out.partial"}
    shell.monkeypatch.setattr(HiddenStates, "__setitem__", original)
    assert shell.quantize()[0] == 0 and shell.left() == {"out"}


def test_a_prompt_longer_than_the_context(shell: Shell) -> None:
    shell.monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
    code, err = shell("run", "model", "word " * 100, "--device", "cpu")
    assert code == 2 and "context 128" in err and "500" in err
    assert shell.left() == set()
