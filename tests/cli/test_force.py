"""`--force` of every command that writes a folder: nothing is lost but what optim itself made."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from optim.cli import main

Make = Callable[..., Path]
TEXT = ("--num-samples", "2", "--seq-len", "16", "--device", "cpu")
COMMANDS = {
    "quantize": ("-m", "rtn", *TEXT, "--no-eval"),
    "prune": ("-m", "threshold", *TEXT, "--no-eval"),
    "pack": (),
    "unpack": (),
    "export": ("-f", "safetensors", "--no-eval"),
}


def run(*words: object) -> int:
    with pytest.MonkeyPatch.context() as patch, open(os.devnull) as nothing:
        patch.setattr(sys, "stdin", nothing)
        patch.setattr(sys, "argv", ["optim", *map(str, words), "--quiet"])
        return main()


def held(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(params=COMMANDS)
def command(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def source(command: str, make_model: Make, tmp_path: Path) -> Path:
    """A model of its own that the command takes."""
    folder = tmp_path / "models" / "source"
    folder.parent.mkdir()
    if command == "unpack":
        assert run("pack", make_model("llama"), "-o", folder) == 0
    else:
        shutil.copytree(make_model("llama"), folder)
    return folder


def test_what_is_read_is_never_replaced(command: str, source: Path, tmp_path: Path, capfd) -> None:
    before = held(tmp_path)
    (tmp_path / "link").symlink_to(source.parent)
    for output in (source, source / "inside", source.parent, tmp_path / "link" / "source"):
        assert run(command, source, *COMMANDS[command], "-o", output, "--force") == 2
        assert "read" in capfd.readouterr().err
    (tmp_path / "link").unlink()
    assert held(tmp_path) == before


def test_only_what_optim_made_is_replaced(
    command: str, source: Path, tmp_path: Path, capfd
) -> None:
    home = tmp_path / "home"
    (home / "thesis").mkdir(parents=True)
    (home / "thesis" / "chapter.tex").write_text("years of work")
    words = (command, source, *COMMANDS[command], "-o", home, "--force")
    assert run(*words) == 2
    assert "thesis/" in capfd.readouterr().err
    assert held(home) == {"thesis/chapter.tex": b"years of work"}
    shutil.rmtree(home)
    assert run(*words) == 0
    made = held(home)
    (home / "README.md").write_text("changed")
    assert run(*words[:-1]) == 2  # without --force
    assert run(*words) == 0 and held(home) == made
    assert {path.name for path in tmp_path.iterdir()} == {"home", "models"}


def test_the_old_one_stays_until_the_new_one_is_whole(
    command: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = (command, source, *COMMANDS[command], "-o", out, "--force")
    assert run(*words) == 0
    before = held(out)
    replace = os.replace

    def full(at: Path, to: Path) -> None:
        if Path(to) == out and Path(at).name == "artifact":
            raise OSError(28, "No space left on device")
        replace(at, to)

    monkeypatch.setattr(os, "replace", full)
    assert run(*words) == 4
    assert held(out) == before
    monkeypatch.setattr(os, "replace", replace)
    assert run(*words) == 0 and held(out) == before


@pytest.mark.parametrize("name", ["quantize", "prune", "pack", "export"])
def test_a_dry_run_says_what_it_would_replace(
    name: str, make_model: Make, tmp_path: Path, capfd
) -> None:
    words = (name, make_model("llama"), *COMMANDS[name], "-o", tmp_path / "out", "--force")
    assert run(*words) == 0
    before = held(tmp_path)
    with pytest.MonkeyPatch.context() as patch, open(os.devnull) as nothing:
        patch.setattr(sys, "stdin", nothing)
        patch.setattr(sys, "argv", ["optim", *map(str, words), "--dry-run"])
        assert main() == 0
    said = " ".join(capfd.readouterr().err.split())
    assert "it would replace what is there:" in said and "config.json" in said
    assert held(tmp_path) == before


def test_a_gguf_file_is_never_replaced(tmp_path: Path, capfd) -> None:
    from optim.runtime.storage.open import open_checkpoint

    (demo,) = open_checkpoint("demo").store.files
    source = tmp_path / "model.gguf"
    shutil.copyfile(demo, source)
    for output in (source, tmp_path):
        for name in ("quantize", "prune"):
            assert run(name, source, *COMMANDS[name], "-o", output, "--force") == 2
            assert "read" in capfd.readouterr().err
    assert source.stat().st_size == demo.stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_the_text_is_never_replaced(make_model: Make, tmp_path: Path, capfd) -> None:
    made = tmp_path / "out"
    assert run("quantize", make_model("llama"), "-m", "rtn", "-o", made) == 0
    (made / "text.txt").write_text("words " * 400)
    words = ("--calibration", made / "text.txt", *TEXT, "-o", made, "--force")
    assert run("quantize", make_model("llama"), *words) == 2
    assert "text.txt, which is read" in capfd.readouterr().err
    assert (made / "text.txt").is_file()
