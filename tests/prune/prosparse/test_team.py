"""Two processes under torchrun end where one does on the same batches."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from optim.prune.plan import plan
from optim.prune.prosparse import held_back
from optim.prune.prosparse import run as prosparse
from optim.recipes.build import build_recipe
from optim.recipes.errors import OptimError
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.system.team import Team

PROGRAM = """
import json, sys
from optim.prune.prosparse import held_back
from optim.prune.prosparse import run as prosparse
from optim.prune.plan import plan
from optim.recipes.build import build_recipe

held_back.HELD_BACK = ("builtin:eval", 32, 2)
made = plan(build_recipe(None, json.loads(sys.argv[1]), []), device="cpu")
prosparse.prune(made, lambda point, total: print(point.step, flush=True))
"""


def keys(model: Path, text: Path, out: Path) -> dict[str, Any]:
    """A short run."""
    return {
        "model": str(model),
        "output": str(out),
        "calibration.dataset": str(text),
        "calibration.num_samples": 4,
        "calibration.seq_len": 32,
        "prune.method": "prosparse",
        "prune.steps": 3,
        "prune.save_every": 2,
    }


def test_two_processes_train_as_one(
    make_model, some_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_model("llama", torch.float32)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = [str(program), json.dumps(keys(source, some_text, tmp_path / "two"))]
    ended = subprocess.run([*runner, *words], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["0", "1", "2"]  # only the leader reports

    monkeypatch.setattr(held_back, "HELD_BACK", ("builtin:eval", 32, 2))
    recipe = build_recipe(None, keys(source, some_text, tmp_path / "one"), [])
    prosparse.prune(plan(recipe, device="cpu"), lambda point, total: None)
    one, two = (open_checkpoint(str(tmp_path / name)) for name in ("one", "two"))
    start = open_checkpoint(str(source))
    for name in one.tensors:
        assert torch.allclose(one.read(name), two.read(name), atol=2e-4), name
        if ".mlp." in name:
            assert not torch.allclose(one.read(name), start.read(name), atol=2e-4), name


def test_a_batch_that_cannot_be_divided_is_refused(
    make_model, some_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prosparse, "join", lambda device: Team(1, 4))
    recipe = build_recipe(None, keys(make_model("llama"), some_text, tmp_path / "o"), [])
    with pytest.raises(OptimError, match="cannot be divided among 4 processes") as caught:
        prosparse.prune(plan(recipe, device="cpu"), lambda point, total: None)
    assert caught.value.code == 2
    assert not (tmp_path / "o.partial").exists()
