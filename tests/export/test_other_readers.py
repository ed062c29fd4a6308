"""What transformers makes of our folders: the same model or a refusal, never random weights."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from optim.export.lossless.pack import pack
from optim.export.lossless.plan import plan as packing
from optim.quant.run import plan, quantize
from optim.recipes.build import build_recipe
from optim.recipes.schema import Pack
from optim.runtime.storage.open import open_checkpoint


def refused(folder: Path) -> None:
    """transformers must not load it; ours must."""
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert open_checkpoint(str(folder)).tensors


@pytest.mark.parametrize("layout", ["df11", "bf12"])
def test_a_folder_packed_without_loss(
    make_model: Callable[[str], Path], tmp_path: Path, layout: str
) -> None:
    out = tmp_path / "out"
    made = packing(str(make_model("llama")), Pack.model_validate({"layout": layout}), str(out))
    pack(made, lambda *_: None)
    refused(out)
    empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(out))
    assert empty.config.model_type == "llama"  # DFloat11's own loader begins so


def test_a_folder_of_static_integers(make_model: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    keys = {"model": str(make_model("llama")), "output": str(out), "quantize.method": "mergequant"}
    windows = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    quantize(plan(build_recipe(flags=keys)), lambda *_: None, windows)
    refused(out)


def test_static_integers_made_before_are_read(tmp_path: Path) -> None:
    old = Path(__file__).parents[1] / "data" / "artifacts" / "static"
    assert (old / "model.safetensors.index.json").is_file()
    assert open_checkpoint(str(shutil.copytree(old, tmp_path / "old"))).tensors
