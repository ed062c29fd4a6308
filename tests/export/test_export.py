"""`optim export`: the plan, the plain folder, and what is refused before any work."""

import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from optim.cli import main
from optim.export.formats import FORMATS
from optim.export.run import export, plan
from optim.recipes.errors import OptimError
from optim.recipes.schema import Export
from optim.runtime.engine.load import why_not
from optim.runtime.storage.dense_view import PlainView
from optim.runtime.storage.manifest import verify
from optim.runtime.storage.open import open_checkpoint

Make = Callable[..., Path]
OLD = Path(__file__).parents[1] / "data" / "artifacts"
PACKED = ["awq4", "awq4-sym", "awq3", "awq8", "awq4-mixed", "awq4-mixture"]


def run(*words: object) -> int:
    with pytest.MonkeyPatch.context() as patch, open(os.devnull) as nothing:
        patch.setattr(sys, "stdin", nothing)
        patch.setattr(sys, "argv", ["optim", "export", *map(str, words)])
        return main()


def written(source: Path, out: Path, **keys: str) -> Path:
    made = plan(str(source), Export.model_validate({"format": "safetensors", **keys}), str(out))
    export(made, lambda *_: None)
    return out


@pytest.mark.parametrize("name", PACKED)
def test_the_plain_folder_is_what_the_integers_stand_for(name: str, tmp_path: Path) -> None:
    view = PlainView(open_checkpoint(str(OLD / name)))
    exact = open_checkpoint(str(written(OLD / name, tmp_path / "f32", type="f32")))
    assert set(exact.tensors) == set(view.tensors) and exact.quantization is None
    for tensor in view.tensors:
        assert torch.equal(exact.read(tensor), view.read(tensor).float()), tensor
    rounded = open_checkpoint(str(written(OLD / name, tmp_path / "bf16")))
    assert all(torch.equal(rounded.read(t), view.read(t).bfloat16()) for t in view.tensors)
    assert verify(tmp_path / "bf16") == []


@pytest.mark.parametrize("form", ["awq", "gptq", "mlx", "compressed-tensors"])
def test_each_format_of_integers_is_a_command(form: str, tmp_path: Path, capfd) -> None:
    source, out = OLD / "awq4", tmp_path / "out"
    words = (source, "--format", form, "-o", out, "--no-eval", "--quiet", "--json")
    assert run(*words, "--dry-run") == 0
    planned = json.loads(capfd.readouterr().out)
    assert not out.exists()
    assert run(*words) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["output"] == str(out) and report["output_bytes"] == planned["output_bytes"]
    before, after = (PlainView(open_checkpoint(str(folder))) for folder in (source, out))
    for tensor in (name for name in before.tensors if before.scheme(name) is not None):
        assert torch.equal(before.integers(tensor)[0], after.integers(tensor)[0]), tensor
    assert verify(out) == []
    assert run(*words) == 2 and "exists" in capfd.readouterr().err
    assert run(*words, "--force") == 0


def test_transformers_loads_it(table_family: str, make_model: Make, tmp_path: Path) -> None:
    source = make_model(table_family)
    out = written(source, tmp_path / "out", type="f32")
    models = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (source, out)]
    ids = torch.randint(3, 200, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = (model(ids).logits for model in models)
    assert torch.equal(first, second)


def test_the_plan_counts_every_weight_and_what_changes(tmp_path: Path) -> None:
    made = plan(str(OLD / "awq4"), Export(format="safetensors"), str(tmp_path / "x"))
    view = made.model
    rows = made.as_dict()["weights"]
    assert sum(row["params"] for row in rows) == sum(
        math.prod(view.info(name).shape) for name in view.tensors
    )
    packed = next(row for row in rows if "4-bit" in row["from"])
    assert "0.0039" in packed["change"]  # 2^-8, bf16's eight digits
    assert all(not row["change"] for row in rows if row["from"] == "bf16")
    assert not (tmp_path / "x").exists()


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optim.export.folder.FILE_BYTES", 20_000)
    whole = written(OLD / "awq4", tmp_path / "whole")
    assert len(list(whole.glob("*.safetensors"))) > 2
    made = plan(str(OLD / "awq4"), Export(format="safetensors"), str(tmp_path / "out"))
    calls = []

    def stop(at: int, total: int, name: str) -> None:
        calls.append(name)
        if len(set(calls)) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(made, stop)
    seen: list[str] = []
    export(made, lambda _a, _b, name: seen.append(name))
    assert calls[0] not in seen  # the first file was kept
    for file in whole.iterdir():
        if file.name != "README.md":
            assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


def test_what_is_refused_says_why(tmp_path: Path, capfd) -> None:
    out = tmp_path / "out"
    for words, said in (
        ((OLD / "static", "-o", out), "static integer activations"),
        ((OLD / "awq4", "-f", "safetensors", "-o", OLD / "awq4"), "is what is read"),
        ((OLD / "awq4", "-f", "safetensors", "--type", "q4_0", "-o", out), "GGUF files alone"),
        ((OLD / "awq4", "-f", "safetensors", "--modelfile", "-o", out), "means nothing to"),
        ((OLD / "awq4", "-f", "gguff", "-o", out), "export.format: must be"),
        ((OLD / "awq4", "--type", "f8", "-o", out), "export.type: must be"),
        ((tmp_path / "none", "-o", out), "there is no folder"),
    ):
        assert run(*words, "--quiet") == 2, said
        err = capfd.readouterr().err
        assert said in err and ("fix:" in err or "must be" in err), err
    assert not out.exists()


@pytest.mark.parametrize("form", ["safetensors", "gguf"])
def test_a_tokenizer_that_cannot_be_read_is_not_handed_on(
    form: str, make_model: Make, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(make_model("llama"), tmp_path / "model"))
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE" "vocab": {}}}')
    with pytest.raises(OptimError, match=r"tokenizer\.json"):
        plan(str(folder), Export(format=form), str(tmp_path / "out"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "lie",
    [
        {"rope_scaling": {"rope_type": [1]}},
        {"hidden_act": "swish2"},
        {"rope_parameters": {"rope_theta": "x"}},
    ],
)
def test_a_configuration_that_run_refuses_is_not_handed_on(
    lie: dict[str, object], make_model: Make, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(make_model("llama"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | lie))
    with pytest.raises(OptimError) as refused:
        plan(str(folder), Export(format="awq"), str(tmp_path / "out"))
    assert why_not(str(folder)) == refused.value.message


def test_a_key_that_a_format_does_not_read_is_refused() -> None:
    known = set(Export.model_fields) - {"format"}
    assert all(exporter.keys <= known for exporter in FORMATS.values())
    assert known == set().union(*(exporter.keys for exporter in FORMATS.values()))


def test_json_and_dry_run(tmp_path: Path, capfd) -> None:
    out = tmp_path / "out"
    words = (OLD / "awq4-sym", "-f", "safetensors", "-o", out, "--json")
    assert run(*words, "--dry-run") == 0
    planned = json.loads(capfd.readouterr().out)
    assert not out.exists() and run(*words) == 0
    made = json.loads(capfd.readouterr().out)
    assert planned["weights"] == made["weights"] and planned["output_bytes"] == made["output_bytes"]
