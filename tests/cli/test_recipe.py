"""`optim recipe`, and what `optim quantize` makes of its flags."""

import json
import sys
from pathlib import Path

import pytest

import optim.cli
from optim.recipes.build import build_recipe, builtin, to_yaml

Captured = pytest.CaptureFixture[str]


class Optim:
    """Runs the command in this process and keeps what it printed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["optim", *arguments])
        code = optim.cli.main()
        return code, *self.capsys.readouterr()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path) -> Optim:
    monkeypatch.chdir(tmp_path)
    return Optim(monkeypatch, capsys)


def test_list_names_every_recipe(run: Optim) -> None:
    code, out, err = run("recipe", "list")
    assert (code, err) == (0, "")
    assert all(name in out and about in out for name, about in builtin().items())
    code, out, _ = run("recipe", "list", "--json")
    assert {row["name"]: row["about"] for row in json.loads(out)} == builtin()


def test_show_prints_a_file_that_builds_the_same_recipe(run: Optim) -> None:
    code, out, err = run("recipe", "show", "awq-w4g64")
    assert (code, err) == (0, "")
    Path("mine.yaml").write_text(out)
    assert build_recipe("mine.yaml") == build_recipe("awq-w4g64")
    _, out, _ = run("recipe", "show", "mine.yaml", "--json")
    assert json.loads(out)["quantize"]["n_grid"] == 20


def test_check(run: Optim) -> None:
    Path("good.yaml").write_text("version: 1\nquantize: {method: rtn}\n")
    Path("bad.yaml").write_text("version: 1\nquantize:\n  method: rtn\n  bits: 5\n")
    problem = "bad.yaml:4: quantize.bits: must be 2, 3, 4 or 8 (got 5)"
    said = f"error: bad.yaml is not a valid recipe (1 problem)\n  {problem}\n"
    assert run("recipe", "check", "good.yaml") == (0, "good.yaml is a valid recipe\n", "")
    assert run("recipe", "check", "bad.yaml") == (2, "", said)
    code, out, err = run("recipe", "check", "bad.yaml", "--json")
    assert (code, err) == (2, said)
    assert json.loads(out) == {"valid": False, "problems": [problem]}
    assert json.loads(run("recipe", "check", "good.yaml", "--json")[1])["valid"] is True


def test_check_of_nothing(run: Optim) -> None:
    assert run("recipe", "check", "nope.yaml") == (
        2,
        "",
        "error: there is no recipe 'nope.yaml'\n"
        "  fix: `optim recipe list` shows the built-in ones; a file is given by its path\n",
    )


def test_schema_is_json(run: Optim) -> None:
    code, out, _ = run("recipe", "schema")
    assert code == 0 and json.loads(out)["title"] == "Recipe"


FLAGS = {
    "-m gptq": "quantize.method=gptq",
    "--bits 3": "quantize.bits=3",
    "-b 8": "quantize.bits=8",
    "--group-size 64": "quantize.group_size=64",
    "-g auto": "quantize.group_size=auto",
    "-g -1": "quantize.group_size=-1",
    "--sym": "quantize.sym=true",
    "--asym": "quantize.sym=false",
    "--ignore a --ignore re:b": "quantize.ignore=[a, 're:b']",
    "--lm-head-bits 8": "quantize.lm_head_bits=8",
    "-o out": "output=out",
    "--calibration notes.txt": "calibration.dataset=notes.txt",
    "--num-samples 3": "calibration.num_samples=3",
    "--seq-len 32": "calibration.seq_len=32",
    "--seed 9": "calibration.seed=9",
    "--n-grid 7": "quantize.n_grid=7",
    "--duo false": "quantize.duo=false",
    "--duo both": "quantize.duo=both",
    "--no-clip": "quantize.clip=false",
    "--compensate": "quantize.compensate=true",
    "--no-compensate": "quantize.compensate=false",
    "--damping 0.5": "quantize.damping=0.5",
    "-m mergequant --act-bits 8": "quantize={method: mergequant, act_bits: 8}",
    "-m mergequant --down-bits 4": "quantize={method: mergequant, down_bits: 4}",
    "-m mergequant --no-rotate": "quantize={method: mergequant, rotate: false}",
    "-m mergequant --no-prefix": "quantize={method: mergequant, prefix: false}",
}


@pytest.mark.parametrize(("flag", "key"), FLAGS.items())
def test_a_flag_is_a_recipe_key(run: Optim, flag: str, key: str) -> None:
    code, out, err = run("quantize", "demo", *flag.split(), "--print-recipe")
    assert (code, err) == (0, "")
    expected = build_recipe(None, {"model": "demo", "quantize.method": "awq"}, [key])
    assert out == to_yaml(expected)


def test_a_recipe_s_method_and_model_stand_unless_flags_say_otherwise(run: Optim) -> None:
    Path("mine.yaml").write_text("version: 1\nmodel: a\nquantize: {method: rtn, bits: 3}\n")
    shown = run("quantize", "--recipe", "mine.yaml", "--print-recipe")[1]
    assert shown == to_yaml(build_recipe("mine.yaml"))
    shown = run("quantize", "b", "--recipe", "mine.yaml", "-m", "awq", "--print-recipe")[1]
    assert "model: b\n" in shown and "method: awq\n  bits: 3\n" in shown


def test_wrong_flags_are_said_at_once(run: Optim) -> None:
    assert run("quantize", "demo", "--bits", "5", "-g", "65", "--seq-len", "1") == (
        2,
        "",
        "error: the command line is not a valid recipe (3 problems)\n"
        "  --bits: quantize.bits: must be 2, 3, 4 or 8 (got 5)\n"
        "  --group-size: quantize.group_size: "
        "must be 'auto', -1, 16, 32, 64, 128 or 256 (got 65)\n"
        "  --seq-len: calibration.seq_len: must be greater than or equal to 16 (got 1)\n",
    )


def test_a_flag_of_another_method_is_refused(run: Optim) -> None:
    code, _, err = run("quantize", "demo", "-m", "rtn", "--n-grid", "3")
    assert code == 2
    assert "--n-grid: quantize.n_grid: not a key of method 'rtn' (it is one of awq)" in err


def test_no_model_is_explained(run: Optim) -> None:
    assert run("quantize", "--recipe", "awq-w4") == (
        2,
        "",
        "error: no model is given\n  fix: optim quantize MODEL; `demo` is one\n",
    )


@pytest.mark.parametrize(
    ("command", "recipe", "other"),
    [("quantize", "df11", "pack"), ("prune", "awq-w4", "quantize"), ("pack", "prosparse", "prune")],
)
def test_a_recipe_of_another_command_is_named(
    command: str, recipe: str, other: str, run: Optim
) -> None:
    code, out, error = run(command, "demo", "--recipe", recipe, "--dry-run")
    assert (code, out) == (2, "")
    assert f"the recipe has no section {command}" in error
    assert f"fix: `optim {other}` runs it" in error
