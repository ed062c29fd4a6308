"""`--dry-run` looks at all that a run would stumble over: the text too, and what the result is."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from optim.cli import main

Make = Callable[..., Path]
SMALL = ("--num-samples", "2", "--seq-len", "16", "--device", "cpu")


def run(*words: object) -> int:
    with pytest.MonkeyPatch.context() as patch, open(os.devnull) as nothing:
        patch.setattr(sys, "stdin", nothing)
        patch.setattr(sys, "argv", ["optim", *map(str, words)])
        return main()


def text_of(kind: str, folder: Path) -> str:
    path = folder / kind
    if kind == "papers":
        path.mkdir()
        (path / "thesis.pdf").write_bytes(b"%PDF-1.7")
    elif kind == "noise.txt":
        path.write_bytes(bytes(range(256)))
    elif kind == "column.jsonl":
        path.write_text(json.dumps({"body": "words " * 100}))
    elif kind == "short.txt":
        path.write_text("Hello.")
    return str(path)


@pytest.mark.parametrize("command", ["quantize", "prune"])
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("gone.txt", "there is no text"),
        ("papers", "has no .txt"),
        ("noise.txt", "is not UTF-8 text"),
        ("column.jsonl", "--text-column"),
        ("short.txt", "is too short"),
    ],
)
def test_the_text_is_looked_at(
    command: str, kind: str, said: str, make_model: Make, tmp_path: Path, capfd
) -> None:
    words = (command, make_model("llama"), "--calibration", text_of(kind, tmp_path), *SMALL)
    assert run(*words, "-o", tmp_path / "out", "--dry-run") == 2
    out, err = capfd.readouterr()
    assert said in err and out == "" and "unexpected" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command", ["quantize", "prune", "pack", "export --format safetensors", "prune -m prosparse"]
)
def test_a_private_file_behind_a_link_is_found_before_work(
    command: str, make_model: Make, tmp_path: Path, capfd
) -> None:
    source = Path(shutil.copytree(make_model("llama"), tmp_path / "model"))
    (tmp_path / "private").write_text("secret")
    (source / "merges.txt").symlink_to(tmp_path / "private")
    first, *flags = command.split()
    assert run(first, source, *flags, "-o", tmp_path / "out", "--dry-run") == 2
    assert "merges.txt is a link that leads out" in capfd.readouterr().err


def test_the_named_fix_is_right(make_model: Make, tmp_path: Path, capfd) -> None:
    text = text_of("column.jsonl", tmp_path)
    words = ("quantize", make_model("llama"), "--calibration", text, *SMALL)
    fix = ("--text-column", "body")
    assert run(*words, *fix, "-o", tmp_path / "out", "--dry-run") == 0


def test_rtn_reads_no_text(make_model: Make, tmp_path: Path, capfd) -> None:
    words = ("quantize", make_model("llama"), "-m", "rtn", "--calibration", tmp_path / "gone.txt")
    assert run(*words, "-o", tmp_path / "out", "--dry-run") == 0


def test_few_bits_are_warned_of(make_model: Make, tmp_path: Path, capfd) -> None:
    words = ("quantize", make_model("llama"), *SMALL, "-o", tmp_path / "out", "--dry-run")
    for bits, said in ((2, "2 bits break"), (3, "23.3 -> 30.7"), (4, "")):
        assert run(*words, "--bits", bits) == 0
        err = capfd.readouterr().err
        assert said in err and (said or "perplexity" not in err)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(make_model: Make, tmp_path: Path, capfd) -> None:
    tmp_path.chmod(0o500)
    for command in ("quantize", "prune", "pack", "export"):
        out = tmp_path / ("out.gguf" if command == "export" else "out")
        assert run(command, make_model("llama"), "-o", out, "--dry-run") == 4
        assert "Cannot write to" in capfd.readouterr().err
    tmp_path.chmod(0o700)


def test_what_python_raises_of_a_closed_place_is_said_plainly(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    def closed(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "out"))

    monkeypatch.setattr(Path, "mkdir", closed)
    assert run("quantize", make_model("llama"), "-m", "rtn", "-o", tmp_path / "out") == 4
    err = capfd.readouterr().err
    assert "Cannot write to" in err and "bug" not in err
    assert list(tmp_path.iterdir()) == []
