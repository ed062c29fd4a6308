"""`optim apply`: recipes of several sections."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from optim.cli import main

Make = Callable[..., Path]
FOUR = """version: 1
model: {model}
calibration: {{dataset: {text}, num_samples: 2, seq_len: 64}}
quantize: {{method: rtn, bits: 4, group_size: 32}}
prune: {{method: threshold, sparsity: 0.3}}
pack: {{layout: bf12}}
export: {{format: compressed-tensors}}
"""


def run(*words: object) -> int:
    with pytest.MonkeyPatch.context() as patch, open(os.devnull) as nothing:
        patch.setattr(sys, "stdin", nothing)
        patch.setattr(sys, "argv", ["optim", *map(str, words)])
        return main()


@pytest.fixture(scope="module")
def recipe(make_model: Make, some_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "four.yaml"
    path.write_text(FOUR.format(model=make_model("llama"), text=some_text))
    return path


@pytest.fixture(scope="module")
def made(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run("apply", recipe, "-o", "out", "--quiet") == 0
    return folder / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_four_sections_make_one_artifact_and_an_export(made: Path) -> None:
    exported = made.with_name("out-compressed-tensors")
    assert {path.name for path in made.parent.iterdir()} == {"out", exported.name}
    manifest = json.loads((made / "optim.json").read_text())
    assert manifest["recipe"].keys() >= {"quantize", "prune", "pack", "export"}
    assert manifest["modules"] and manifest["sparsity"] and manifest["packed_bits"]
    assert manifest["evaluation"]["kl"] > 0 and manifest["cost"]["seconds"] > 0
    assert ".partial" not in json.dumps(manifest)
    card = (made / "README.md").read_text()
    assert "quantized (rtn), then pruned (threshold), then what stayed bf16 packed" in card
    assert "optim apply recipe.yaml" in card and ".partial" not in card


def test_its_recipe_makes_the_same_bytes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("apply", made / "recipe.yaml", "-o", "out", "--quiet") == 0
    for name in ("out", "out-compressed-tensors"):
        first, second = contents(made.with_name(name)), contents(tmp_path / name)
        told = [json.loads(files.pop("optim.json")) for files in (first, second)]
        assert {**told[0], "cost": 0} == {**told[1], "cost": 0}  # the seconds that it took
        del first["README.md"], second["README.md"]
        assert first == second


def test_every_number_of_its_card_holds(made: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("verify", made, "--json", "--quiet") == 0
    claims = json.loads(capfd.readouterr().out)["claims"]
    assert all(claim["holds"] for claim in claims)
    assert {"kl", "bits per weight", "bytes of the side file", "packed tensors"} <= {
        claim["name"] for claim in claims
    }


def test_the_export_is_measured_too(made: Path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(made.parent)
    assert run("verify", "out-compressed-tensors", "--json", "--quiet") == 0
    claims = {claim["name"]: claim for claim in json.loads(capfd.readouterr().out)["claims"]}
    assert claims["source"]["holds"] and claims["kl"]["holds"]
    assert "## What it cost" in Path("out-compressed-tensors/README.md").read_text()


def test_it_runs_and_skips_what_the_step_before_packing_did(made: Path, tmp_path: Path) -> None:
    """Packing changes no logit of a pruned model, and unpacking brings its side file back."""
    from optim.runtime.engine.load import load_model

    assert run("run", made, "ab", "--raw", "--max-tokens", "4", "--temperature", "0") == 0
    assert run("unpack", made, "-o", tmp_path / "plain", "--quiet") == 0
    assert (tmp_path / "plain" / "sparsity.safetensors").is_file()
    ids = torch.arange(5, 12)[None]
    models = [load_model(str(folder), device="cpu") for folder in (made, tmp_path / "plain")]
    logits = []
    for model in models:
        cache = model.new_cache()
        model.forward(ids, cache)
        logits.append(model.forward(ids[:, :1], cache))
    assert torch.equal(*logits)


def test_a_dry_run_plans_every_section_and_writes_nothing(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("apply", recipe, "-o", tmp_path / "out", "--dry-run", "--json") == 0
    plan = json.loads(capfd.readouterr().out)
    assert list(plan["steps"]) == ["quantize", "prune", "pack", "export"]
    assert plan["steps"]["export"]["output_bytes"] > 0
    assert run("apply", recipe, "-o", tmp_path / "out", "--dry-run") == 0
    assert "quantize, then prune, then pack, then export" in capfd.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_quantize_and_tune_in_one_command(
    make_model: Make, some_text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As with two commands, to the byte; the manifest has what each of them says."""
    model, text = make_model("llama"), ("--calibration", some_text, "--seq-len", 32)
    given = (*text, "--num-samples", 4, "--no-eval", "--threads", 1, "--quiet", "--json")
    quantize = ("quantize", model, "-m", "rtn", "-g", 32, *given)
    assert run(*quantize, "--tune", "end", "-o", tmp_path / "both") == 0
    report = json.loads(capfd.readouterr().out)
    assert report["steps"]["tune"]["kl"][0] > min(report["steps"]["tune"]["kl"])
    assert run(*quantize, "-o", tmp_path / "first") == 0
    assert run("tune", tmp_path / "first", "--against", model, *given, "-o", tmp_path / "then") == 0
    name = "model.safetensors"
    assert (tmp_path / "both" / name).read_bytes() == (tmp_path / "then" / name).read_bytes()
    manifest = json.loads((tmp_path / "both" / "optim.json").read_text())
    assert manifest["held_back"]["kl"] == report["steps"]["tune"]["kl"]
    assert manifest["recipe"]["tune"] == {"loss": "end", "epochs": 3, "lr": 1e-3}
    assert (
        "quantized (rtn), then its scales and norms tuned"
        in (tmp_path / "both" / "README.md").read_text()
    )
    capfd.readouterr()
    assert run("quantize", model, "--grid", "q4_0", "--tune", "end", "--dry-run") == 2
    assert "they cannot be tuned" in " ".join(capfd.readouterr().err.split())


def test_a_run_that_was_stopped_goes_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("apply", recipe, "-o", tmp_path / "out", "--quiet", "--no-eval", "--keep-steps")
    stop = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr("optim.export.lossless.pack.pack", stop)
        assert run(*words) == 130
    assert {path.name for path in tmp_path.iterdir()} == {"out.partial"}
    monkeypatch.setattr("optim.quant.run.quantize", lambda *_: pytest.fail("it is there already"))
    with monkeypatch.context() as patch:
        patch.setattr("optim.export.run.export", stop)
        assert run(*words) == 130
    kept = {"out", "out.steps"}
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert {path.name for path in (tmp_path / "out.steps").iterdir()} == {"quantize", "prune"}
    words = tuple(word for word in words if word != "--keep-steps")
    assert run(*words) == 0  # the export is left to do
    assert {path.name for path in tmp_path.iterdir()} == kept | {"out-compressed-tensors"}
    assert run(*words) == 2


def test_what_an_export_would_refuse_is_refused_before_any_work(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    override = "quantize.overrides=[{targets: ['re:.*down_proj'], bits: 8}]"
    sets = ("--set", override, "--set", "export.format=gptq")
    assert run("apply", recipe, "-o", tmp_path / "out", *sets) == 2
    assert "4 and 8 bits, GPTQ one of" in " ".join(capfd.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_of_one_section_is_its_command(
    make_model: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = (make_model("llama"), "-o", tmp_path / "out", "--quiet", "--no-eval", "--json")
    assert run("apply", "rtn-w4", *words) == 0
    assert json.loads(capfd.readouterr().out)["bits_per_weight"] > 4
    assert run("apply", "rtn-w4") == 2
    assert "optim apply RECIPE MODEL" in capfd.readouterr().err
