"""Solving in GGUF's own grids: what is stored are its blocks, and the export copies them."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from optim.export.gguf.families import gguf_name, row_of
from optim.export.run import export
from optim.export.run import plan as export_plan
from optim.quant import gptq
from optim.quant.plan import plan
from optim.quant.run import Report, quantize
from optim.quant.tune.run import tune
from optim.quant.tune.train import Asked
from optim.recipes.build import build_recipe
from optim.recipes.errors import OptimError
from optim.recipes.schema import Calibration, Export, Recipe
from optim.runtime.decoder.layers import MLP
from optim.runtime.engine.build import build
from optim.runtime.formats.blocks import BLOCKS
from optim.runtime.measure.quality import evaluate_windows
from optim.runtime.storage.dense_view import PlainView
from optim.runtime.storage.gguf.store import INTERLEAVED, deinterleave
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.storage.size_table import stored
from optim.runtime.storage.tensors import SafetensorsFiles

Make = Callable[..., Path]
Compress = Callable[..., Report]
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


def solved(model: Path, text: Path, out: Path, grid: str, **keys: object) -> Path:
    section = {"method": "awq", "grid": grid} | keys
    recipe = Recipe.model_validate(
        {
            "version": 1,
            "model": str(model),
            "output": str(out),
            "calibration": {"dataset": str(text), "num_samples": 4, "seq_len": 32},
            "quantize": section,
        }
    )
    quantize(plan(recipe, device="cpu"), lambda *_: None)
    return out


def exported(source: Path, out: Path, kind: str | None = None) -> Path:
    made = export_plan(str(source), Export(format="gguf", type=kind), str(out))
    assert all(held.moved is None or held.moved.steps == 0 for held in made.held)
    export(made, lambda *_: None)
    return out


@pytest.mark.parametrize("grid", sorted(BLOCKS))
def test_every_grid(grid: str, make_model: Make, some_text: Path, tmp_path: Path) -> None:
    """Its file has the very weights of the artifact, in these blocks, and they stay packed."""
    model = make_model("llama", **WIDE)
    folder = solved(model, some_text, tmp_path / "made", grid, method="rtn")
    file = exported(folder, tmp_path / "m.gguf")
    view = PlainView(open_checkpoint(str(folder)))
    arch, tensors = row_of(view).arch, {t.name: t for t in gguf.GGUFReader(file).tensors}
    packed = [name for name in view.tensors if view.scheme(name)]
    assert len(packed) == 14
    _shown_as_stored(folder, grid)
    for name in packed:
        tensor = tensors[gguf_name(name, arch)]
        assert tensor.tensor_type.name == grid.upper()
        got = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2], 0)
        got = deinterleave(got, heads) if heads and arch in INTERLEAVED else got
        torch.testing.assert_close(got, view.read(name), rtol=1e-6, atol=1e-7)
    checkpoint = open_checkpoint(str(folder))
    decoder, _ = build(checkpoint, torch.device("cpu"), torch.float32)
    mlp = decoder.blocks[1].mlp
    assert isinstance(mlp, MLP)
    linear = mlp.down
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(1))
    wanted = x @ view.read("model.layers.1.mlp.down_proj.weight").T
    assert linear.nbytes < 2 * 512 * 256
    assert float((linear(x) - wanted).norm() / wanted.norm()) < 0.015  # activations have 8 bits


def _shown_as_stored(folder: Path, grid: str) -> None:
    """The size table has the bytes that are in the file, under the name of the type."""
    rows = stored(open_checkpoint(str(folder)))
    infos = SafetensorsFiles(folder.glob("*.safetensors")).infos
    held = {name: info.nbytes for name, info in infos.items() if name.endswith("weight_blocks")}
    found = {row.name: row.nbytes for row in rows if row.format == grid.upper()}
    assert found == {name.replace("weight_blocks", "weight"): size for name, size in held.items()}


def test_its_scales_cannot_be_tuned(make_model: Make, some_text: Path, tmp_path: Path) -> None:
    model = make_model("llama", **WIDE)
    folder = solved(model, some_text, tmp_path / "made", "q4_0", method="rtn")
    text, out = Calibration(dataset=str(some_text)), tmp_path / "tuned"
    with pytest.raises(OptimError, match="cannot be written back") as caught:
        tune(str(folder), str(model), str(out), text, Asked(), lambda *_: None)
    assert caught.value.code == 2 and not out.exists()


@pytest.mark.parametrize("grid", ["q4_0", "iq4_nl", "q3_k"])
def test_it_costs_less_than_plain_rounding(
    grid: str, make_model: Make, some_text: Path, tmp_path: Path
) -> None:
    model = make_model("llama", **WIDE)
    made = [
        solved(model, some_text, tmp_path / method, grid, method=method)
        for method in ("awq", "rtn")
    ]
    base = open_checkpoint(str(model))
    windows = torch.randint(3, 259, (4, 48), generator=torch.Generator().manual_seed(2))
    found = evaluate_windows([open_checkpoint(str(m)) for m in made], base, windows)
    assert found[0].kl is not None and found[1].kl is not None
    assert found[0].kl < 0.8 * found[1].kl


def test_the_recipe_it_keeps_makes_the_same(
    make_model: Make, some_text: Path, tmp_path: Path
) -> None:
    model = make_model("llama")
    first = solved(model, some_text, tmp_path / "first", "q4_1")
    recipe = build_recipe(str(first / "recipe.yaml"), {"output": str(tmp_path / "again")})
    assert recipe.quantize is not None and recipe.quantize.grid == "q4_1"
    quantize(plan(recipe, device="cpu"), lambda *_: None)
    one, two = (next(f.glob("*.safetensors")).read_bytes() for f in (first, tmp_path / "again"))
    assert one == two
    config = json.loads((first / "config.json").read_text())["quantization_config"]
    assert set(config["modules"].values()) == {"q4_1"} and len(config["modules"]) == 14


def test_widths_that_a_k_type_has_not_get_blocks_of_32(
    make_model: Make, some_text: Path, tmp_path: Path
) -> None:
    keys = {"lm_head_bits": 8, "overrides": [{"targets": ["re:.*v_proj"], "grid": "q6_k"}]}
    model = make_model("llama", intermediate_size=256)
    folder = solved(model, some_text, tmp_path / "made", "q4_k", **keys)
    view = PlainView(open_checkpoint(str(folder)))
    kinds = {name.split(".")[-2]: view.kept_as(name) for name in view.tensors if view.scheme(name)}
    assert kinds["down_proj"] == "Q4_K" and kinds["q_proj"] == "Q5_0"
    assert kinds["v_proj"] == kinds["lm_head"] == "Q8_0"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"grid": "q4_0", "bits": 3}, "bits cannot be given beside it"),
        ({"grid": "q4_0", "sym": True, "group_size": 64}, "group_size, sym cannot"),
        ({"grid": "q9"}, "grid"),
        ({"overrides": [{"targets": ["Linear"], "grid": "q4_0"}]}, "where the section has one"),
        ({"grid": "q4_0", "overrides": [{"targets": ["Linear"], "bits": 8}]}, "overrides"),
        ({"grid": "q4_0", "method": "mergequant"}, "grid"),
    ],
)
def test_keys_that_do_not_go_together(keys: dict[str, object], said: str) -> None:
    section = {"quantize.method": "awq"} | {f"quantize.{k}": v for k, v in keys.items()}
    with pytest.raises(OptimError) as refused:
        build_recipe(None, {"model": "demo"} | section)
    assert said in refused.value.message


def test_inputs_that_no_block_divides(make_model: Make, some_text: Path, tmp_path: Path) -> None:
    model = make_model("llama", intermediate_size=80)
    with pytest.raises(OptimError, match="does not divide") as refused:
        solved(model, some_text, tmp_path / "made", "q4_0")
    assert "ignore" in str(refused.value.fix) and "--group-size" not in str(refused.value.fix)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format_version": 2}, "version 1"),
        ({"modules": []}, "version 1"),
        ({"modules": {"model.layers.0.mlp.up_proj": "q9"}}, "has blocks of the type"),
    ],
)
def test_a_configuration_that_lies(
    change: dict[str, object], said: str, make_model: Make, some_text: Path, tmp_path: Path
) -> None:
    folder = solved(make_model("llama"), some_text, tmp_path / "made", "q4_0", method="rtn")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(OptimError, match=said):
        open_checkpoint(str(folder))


def test_the_compiled_codebook_equals_the_reference() -> None:
    make = torch.Generator().manual_seed(4)
    w = torch.randn(96, 70, generator=make)
    scale = (torch.rand(96, 70, generator=make) + 0.5) * torch.randn(96, 70, generator=make).sign()
    factor = (torch.randn(96, 96, generator=make) * 0.1).triu(1)
    args = (w, w, scale * 0.02, torch.zeros(96, 70), factor, 15.0, BLOCKS["iq4_nl"].codebook)
    q, error = gptq._round_block(*args)
    wanted, wanted_error = gptq.round_block_reference(*args)
    same = (q == wanted).all(0)  # sums in another order turn ties
    assert same.float().mean() > 0.9
    assert torch.allclose(error[:, same], wanted_error[:, same], atol=1e-4)


def test_sweeps_move_no_grid_of_gguf() -> None:
    with pytest.raises(ValueError, match="sweeps move scales freely, those of grid q4_0"):
        Recipe.model_validate(
            {"version": 1, "quantize": {"method": "awq", "grid": "q4_0", "sweeps": 1}}
        )
