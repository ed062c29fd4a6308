"""Which folder may be written: never one that is read, and over nothing that optim did not make."""

import json
import os
from pathlib import Path

import pytest

from optim.recipes.errors import MACHINE, USAGE
from optim.runtime.system.output import contents, is_artifact, output_problems, refusal


def artifact(folder: Path) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"1234")
    shards = {"model.safetensors": "0"}
    (folder / "optim.json").write_text(json.dumps({"format_version": 1, "shards": shards}))
    return folder


def said(output: Path, force: bool = True, need: int = 0, inputs: tuple[Path, ...] = ()) -> str:
    problems = output_problems(output, force, need, inputs)
    assert all(problem.code == USAGE and problem.fix for problem in problems)
    return " / ".join(problem.message for problem in problems)


def test_what_optim_made_is_replaced_by_force_alone(tmp_path: Path) -> None:
    made = artifact(tmp_path / "out")
    assert said(made) == "" and "exists" in said(made, force=False)
    assert contents(made).endswith("in 2 files (model.safetensors, optim.json)")


@pytest.mark.parametrize(
    "manifest", ["", "[]", "{}", '{"shards": []}', '{"shards": {"gone": 1}}', "[" * 9999, "\0"]
)
def test_a_manifest_that_says_nothing_is_none(manifest: str, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("keep")
    (tmp_path / "optim.json").write_text(manifest)
    assert not is_artifact(tmp_path) and "thesis.tex" in said(tmp_path)


def test_other_folders_and_files_stay(tmp_path: Path) -> None:
    (tmp_path / "home" / "thesis").mkdir(parents=True)
    (tmp_path / "home" / "a.txt").write_text("keep")
    assert "4 B in 1 files (a.txt, thesis/)" in said(tmp_path / "home")
    assert "a file of 4 B" in said(tmp_path / "home" / "a.txt")
    assert said(tmp_path / "home", force=False).count("optim has not made it") == 1


def test_a_link_is_never_replaced(tmp_path: Path) -> None:
    made = artifact(tmp_path / "out")
    (tmp_path / "link").symlink_to(made)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert "is a link to" in said(tmp_path / "link")
    assert refusal(tmp_path / "dangling", True) is not None


def test_what_is_read_is_never_written(tmp_path: Path) -> None:
    source = artifact(tmp_path / "model")
    (tmp_path / "other").symlink_to(tmp_path)
    weights = tmp_path / "model.gguf"
    weights.write_bytes(b"GGUF")
    inputs = (source, weights)
    assert "is what is read" in said(source, inputs=inputs)
    assert "is what is read" in said(tmp_path / "other" / "model", inputs=inputs)
    assert "is what is read" in said(weights, inputs=inputs)
    assert "is inside" in said(source / "deep" / "out", inputs=inputs)
    assert "holds" in said(tmp_path, inputs=inputs)
    assert said(tmp_path / "out", inputs=inputs) == ""


def test_a_workspace_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    theirs = tmp_path / "out.partial"
    (theirs / "artifact").mkdir(parents=True)
    assert said(tmp_path / "out") == ""  # a run that was killed before its first line
    (theirs / "artifact" / "thesis.tex").write_text("keep")
    assert "out.partial is in the way" in said(tmp_path / "out")


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    (problem,) = output_problems(tmp_path / "deep" / "out", False, 0)
    assert problem.message == f"Cannot write to {tmp_path}" and problem.code == MACHINE


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_name_that_cannot_be_made(name: str, tmp_path: Path) -> None:
    assert "cannot be made" in said(tmp_path / name)


def test_sizes_that_look_alike_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(1_400_000_000))
    (problem,) = output_problems(tmp_path / "out", False, 1_400_000_001)
    assert "1,400,000,001 bytes" in problem.message and "1,400,000,000 bytes" in problem.message
    (problem,) = output_problems(tmp_path / "out", False, 1_410_000_000)
    assert "1.41 GB" in problem.message and "1.40 GB" in problem.message
