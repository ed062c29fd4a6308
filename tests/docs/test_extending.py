"""The worked example of docs/extending.md, followed to the letter in a copy of the project."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
PACKAGES = ("recipes", "runtime", "quant", "prune", "export", "cli")
FILE = Path("runtime/storage/lossless/split.py")
# One process for all commands: most of a command's time is the import of torch.
PROGRAM = """
import json, sys
from optim.cli import main
for arguments in json.load(sys.stdin):
    sys.argv = ["optim", *arguments]
    if code := main():
        sys.exit(code)
    print("\\0", flush=True)
"""


def blocks(kind: str) -> list[str]:
    """The page's fenced blocks of a kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, flags=re.M | re.S)


def apply(change: str, files: list[Path]) -> Path:
    """Replace a block's lines with `-` by those with `+`, in the one file that has them."""
    old = "".join(line[1:] for line in change.splitlines(True) if line.startswith("-"))
    new = "".join(line[1:] for line in change.splitlines(True) if line.startswith("+"))
    (path,) = (path for path in files if old in path.read_text(encoding="utf-8"))
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages with the example in it."""
    copy = tmp_path_factory.mktemp("copy") / "optim"
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, copy / package, ignore=ignored)
    (code,) = blocks("python")
    (copy / FILE).write_text(code, encoding="utf-8")
    files = [copy / "recipes/writing.py", copy / "runtime/storage/lossless/layouts.py"]
    changed = [apply(change, files) for change in blocks("diff")]
    assert changed == [files[0], files[1], files[1]]  # one literal, one row and its import
    return copy.parent


def optim(extended: Path, *commands: list[str]) -> list[str]:
    """What the extended program prints for each of its command lines, which must succeed."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(commands),
        env=os.environ | {"PYTHONPATH": str(extended)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0\n")


def test_the_example_works(extended: Path, make_model: Callable[..., Path], tmp_path: Path) -> None:
    source, packed, back = (str(p) for p in (make_model("llama"), tmp_path / "p", tmp_path / "b"))
    run = ["--raw", "--seed", "1", "--max-tokens", "8", "--threads", "1", "Line 1"]
    made, seen, _, plain, again, _ = optim(
        extended,
        ["pack", source, "--layout", "split", "-o", packed, "--json"],
        ["inspect", packed, "--verify", "--json"],
        ["unpack", packed, "-o", back, "--quiet"],
        ["run", source, *run],
        ["run", packed, *run],
    )
    report = json.loads(made)
    assert report["layout"] == "split" and report["packed_bits_per_weight"] == 16
    assert "split" in seen
    assert plain == again and plain.strip()
    before = load_file(f"{source}/model.safetensors")
    after = {k: v for path in Path(back).glob("*.safetensors") for k, v in load_file(path).items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k].view(torch.uint8), after[k].view(torch.uint8)) for k in after)


def test_the_original_does_not_know_it() -> None:
    assert not (ROOT / FILE).exists()
    assert all("split" not in path.name for path in (ROOT / FILE.parent).iterdir())
