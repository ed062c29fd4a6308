"""What prune refuses, and how it says so."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from optim.prune.run import Report, plan
from optim.recipes.build import build_recipe
from optim.recipes.errors import OptimError
from optim.recipes.schema import Recipe
from optim.runtime.engine.load import load_model
from optim.runtime.sparsity.side_file import SIDE

Prune = Callable[..., Report]
MakeModel = Callable[..., Path]
MakeRecipe = Callable[..., Recipe]


def refused(call: Callable[[], Any]) -> OptimError:
    with pytest.raises(OptimError) as caught:
        call()
    assert caught.value.code == 2
    return caught.value


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"prune.method": "coreinfer", "prune.keep": 0.0}, "keep: must be greater than 0"),
        ({"prune.method": "coreinfer", "prune.keep": 1.5}, "keep: must be less than or equal to 1"),
        ({"prune.method": "threshold", "prune.sparsity": 1.0}, "sparsity: must be less than 1"),
        ({"prune.method": "threshold", "prune.keep": 0.5}, "not a key of method 'threshold'"),
        ({"prune.method": "wanda"}, "unknown method 'wanda'; choose one of 'threshold'"),
    ],
)
def test_flags_out_of_range(keys: dict[str, Any], said: str) -> None:
    assert said in refused(lambda: build_recipe(None, {"model": "demo", **keys})).message


def test_mixtures_are_refused(
    make_model: MakeModel, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe(make_model("mixtral"), tmp_path / "out", "threshold")
    assert "mixture of experts" in refused(lambda: plan(recipe)).message


def test_unknown_families_are_refused(
    make_model: MakeModel, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe(make_model("starcoder2"), tmp_path / "out", "coreinfer")
    assert "is not understood" in refused(lambda: plan(recipe)).message


def test_a_fused_gate_cannot_be_looked_at_alone(
    make_model: MakeModel, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe(make_model("phi3"), tmp_path / "out", "threshold", only="gate")
    assert "gate and up as one matrix" in refused(lambda: plan(recipe)).message


def test_too_little_text(make_model: MakeModel, pruned: Prune, tmp_path: Path) -> None:
    source, text = make_model("llama"), tmp_path / "short.txt"
    text.write_text("Hello.")
    recipe = Recipe.model_validate(
        {
            "version": 1,
            "model": str(source),
            "output": str(tmp_path / "out"),
            "calibration": {"dataset": str(text), "num_samples": 4, "seq_len": 32},
            "prune": {"method": "threshold"},
        }
    )
    from optim.prune.run import prune

    error = refused(lambda: prune(plan(recipe), lambda at, total, text: None))
    assert "short.txt" in error.message
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_an_existing_output_is_kept(
    make_model: MakeModel, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe(make_model("llama"), tmp_path, "threshold")
    assert "exists" in refused(lambda: plan(recipe)).message


def test_the_side_file_of_another_model(
    make_model: MakeModel, pruned: Prune, tmp_path: Path
) -> None:
    pruned(make_model("llama"), tmp_path / "a", "threshold")
    pruned(make_model("llama", torch.float32), tmp_path / "b", "threshold")
    shutil.copy(tmp_path / "a" / SIDE, tmp_path / "b" / SIDE)
    error = refused(lambda: load_model(str(tmp_path / "b")))
    assert "another model" in error.message and "delete the file" in str(error.fix)


@pytest.mark.parametrize("damage", [b"", b"nonsense", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_damaged_side_file(
    damage: bytes, make_model: MakeModel, pruned: Prune, tmp_path: Path
) -> None:
    pruned(make_model("llama"), tmp_path / "out", "threshold")
    (tmp_path / "out" / SIDE).write_bytes(damage)
    assert "cannot be used" in refused(lambda: load_model(str(tmp_path / "out"))).message.replace(
        "is not a side file that can be used", "cannot be used"
    )


def test_a_threshold_of_whole_numbers_is_refused(
    make_model: MakeModel, pruned: Prune, tmp_path: Path
) -> None:
    pruned(make_model("llama"), tmp_path / "out", "threshold")
    path = tmp_path / "out" / SIDE
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    tensors["model.layers.1.down.threshold"] = torch.tensor(1)
    save_file(tensors, path, metadata)
    message = refused(lambda: load_model(str(tmp_path / "out"))).message
    assert "model.layers.1.down.threshold is of torch.int64" in message


def test_another_quantization_is_refused(
    make_model: MakeModel, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    folder = tmp_path / "gptq"
    shutil.copytree(make_model("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    recipe = make_recipe(folder, tmp_path / "out", "threshold")
    assert "quantized with gptq" in refused(lambda: plan(recipe)).message
