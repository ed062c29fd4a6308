"""Processes that torchrun started solve a model together: what they make is what one makes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from optim.quant.plan import plan
from optim.quant.run import quantize
from optim.recipes.build import build_recipe
from optim.recipes.errors import OptimError
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.system.team import Team

MakeModel = Callable[..., Path]
RUNNER = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
FLAGS = ("--guide", "loss", "--sweeps", "1", "--group-size", "32", "--num-samples", "5")


def _together(model: Path, text: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    words = ("-m", "optim.cli", "quantize", str(model), "-o", str(out), "--calibration", str(text))
    command = [*RUNNER, *words, "--seq-len", "32", "--no-eval", "--json", *FLAGS, *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_two_processes_make_what_one_makes(
    make_model: MakeModel, some_text: Path, tmp_path: Path
) -> None:
    """Integers but for one in a thousand that the order of a sum has moved, scales to 1e-2; one
    report; a mixture's experts may be read in one of the processes only."""
    model = make_model("mixtral")
    ended = _together(model, some_text, tmp_path / "two")
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    assert Path(report["output"]).name == "two" and len(report["blocks"]) == 2
    assert not list(tmp_path.glob("*.partial"))

    keys = {"model": str(model), "output": str(tmp_path / "one"), "quantize.method": "awq"}
    keys |= {"calibration.dataset": str(some_text), "calibration.seq_len": 32}
    sets = ["quantize.guide=loss", "quantize.sweeps=1", "quantize.group_size=32"]
    made = plan(build_recipe(None, keys, [*sets, "calibration.num_samples=5"]), device="cpu")
    quantize(made, lambda at, total, text: None)
    one, two = (open_checkpoint(str(tmp_path / name)) for name in ("one", "two"))
    assert one.tensors.keys() == two.tensors.keys()
    same = total = 0
    for name in one.tensors:
        ours, theirs = one.read(name), two.read(name)
        if name.endswith("_packed"):
            steps = 4 * torch.arange(8)
            digits = [(w[..., None] >> steps) & 15 for w in (ours, theirs)]
            same, total = same + int((digits[0] == digits[1]).sum()), total + digits[0].numel()
        elif ours.is_floating_point():
            assert torch.allclose(ours.float(), theirs.float(), rtol=1e-2, atol=1e-6), name
    assert total and same / total > 0.999
    manifests = [json.loads((c.folder / "optim.json").read_text()) for c in (one, two)]
    for key in ("guided", "unguided"):
        both = [found["blocks"][0]["held_back"][key] for found in manifests]
        assert both[0] == pytest.approx(both[1], rel=0.01)


def test_every_thing_is_done_once() -> None:
    """Shares lie one behind the other, and leave nothing out."""
    for count, size in ((5, 2), (64, 3), (4, 4)):
        parts = [range(count)[Team(rank, size).part(count)] for rank in range(size)]
        assert [k for part in parts for k in part] == list(range(count))
        assert min(len(part) for part in parts) >= 1
    assert Team().divide([3, 1, 2], lambda x: x * x) == [9, 1, 4]


@pytest.mark.parametrize(
    ("method", "said"), [("rtn", "work of one process"), ("awq", "cannot be shared among 9")]
)
def test_what_cannot_be_shared_is_refused(
    method: str, said: str, make_model: MakeModel, some_text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", "9")
    monkeypatch.setattr("optim.quant.run.join", lambda device: Team(0, 9))
    monkeypatch.setattr(Team, "leave", lambda self: None)
    keys = {"model": str(make_model("llama")), "output": str(tmp_path / "out")}
    keys |= {"calibration.dataset": str(some_text), "quantize.method": method}
    sets = ["calibration.num_samples=4", "calibration.seq_len=32"]
    made = plan(build_recipe(None, keys, sets), device="cpu")
    with pytest.raises(OptimError, match=said) as caught:
        quantize(made, lambda at, total, text: None)
    assert caught.value.code == 2
    assert not (tmp_path / "out.partial").exists()
