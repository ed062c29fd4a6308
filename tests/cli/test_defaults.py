"""The user's file of defaults: read strictly, and what is typed goes over it."""

import sys
from pathlib import Path
from typing import Any

import pytest

import optim.cli
from optim.cli import run as module
from optim.cli.defaults import model

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "optim" / "config.yaml"
    path.parent.mkdir()
    monkeypatch.delenv("OPTIM_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return path


def asked(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, Any, Any]:
    """The exit code of `optim run`, and the options that reach it: how to ask, how to draw."""
    seen: list[Any] = [None, None]

    def run(source: str, prompt: str, asking: Any, drawing: Any) -> int:
        seen[:] = asking, drawing.given
        return 0

    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(sys, "argv", ["optim", "run", "m", "hi", *arguments])
    return (optim.cli.main(), *seen)


def test_defaults_hold_until_something_is_typed(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(
        "# mine\nrun:\n  temperature: 0.25\n  kv-bits: 8\n  stats: true\n  stop: [END]\n"
    )
    code, asking, drawn = asked(monkeypatch, "--kv-bits", "4")
    assert (code, asking.kv_bits, asking.stats) == (0, 4, True)
    assert drawn == {"temperature": 0.25, "stop": ("END",)}
    monkeypatch.setenv("OPTIM_CONFIG", "")
    assert asked(monkeypatch)[2] == {}


def test_a_file_of_comments_is_no_default(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("# run:\n")
    assert asked(monkeypatch)[2] == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rum: {threads: 2}", "rum: defaults are for run, eval, bench; did you mean 'run'?"),
        ("quantize: {bits: 3}", "quantize: defaults are for run"),
        ("run: {temprature: 1}", "run.temprature: unknown; did you mean 'temperature'?"),
        ("run: {temperature: hot}", "run.temperature: Input should be a valid number"),
        ("run: {threads: 0}", "run.threads: Input should be greater than or equal to 1"),
        ("run: {output: rows.jsonl}", "run.output: unknown"),
        ("run: 3", "run must have options"),
        ("run: {threads: 1, threads: 2}", "threads"),
        ("- run", "not a mapping"),
        ("run: !!python/object:os.system {}", "tag"),
        ("run: {threads", "not valid YAML"),
    ],
)
def test_anything_else_is_refused_with_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured, text: str, said: str
) -> None:
    file.write_text(text, encoding="utf-8")
    code, asking, _ = asked(monkeypatch)
    err = capsys.readouterr().err
    assert (code, asking) == (2, None)
    assert said in err and str(file) in err
    assert "recipe" not in err


def test_a_named_file_must_be_there(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setenv("OPTIM_CONFIG", "/nowhere/at/all.yaml")
    assert asked(monkeypatch)[0] == 2
    assert "cannot read the defaults of /nowhere/at/all.yaml" in capsys.readouterr().err


def test_a_name_of_the_user_stands_for_a_model(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    file.write_text("models:\n  qwen: owner/name@v1\n  here: other/one\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert [model(one) for one in ("qwen", "here", "owner/name", None)] == [
        *("owner/name@v1", "here", "owner/name", None)
    ]
    assert model(["qwen", "demo"]) == ["owner/name@v1", "demo"]
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["optim", "list"])
    assert optim.cli.main() == 0
    assert "owner/name@v1" in capsys.readouterr().out


@pytest.mark.parametrize("words", [("inspect", "gone"), ("eval", "demo", "--against", "gone"),
                                   ("compare", "demo", "gone"), ("unpack", "gone", "-o", "x"),
                                   ("rm", "gone"), ("quantize", "gone", "--dry-run")])  # fmt: skip
def test_it_is_one_wherever_a_model_is_given(
    words: tuple[str, ...], file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    file.write_text("models: {gone: ./no-such-folder}\n")
    monkeypatch.setattr(sys, "argv", ["optim", *words])
    assert optim.cli.main() != 0
    assert "no-such-folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: [a]", "models must have names"),
        ("models: {demo: a/b}", "models.demo is no name"),
        ("models: {a/b: c/d}", "models.a/b is no name"),
        ("models: {a: [b]}", "models.a must be a hub id"),
        ("models: {a: ''}", "models.a must be a hub id"),
    ],
)
def test_names_that_cannot_be_are_refused_at_once(
    text: str, said: str, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    file.write_text(text)
    assert asked(monkeypatch)[0] == 2
    assert said in capsys.readouterr().err
