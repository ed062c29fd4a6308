"""Static integers on tiny models: exact folds, the whole path, evaluation and engine alike."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optim.quant.mergequant.prefix import find_prefix, outliers
from optim.quant.mergequant.rotation import fold_norm, places, turn
from optim.quant.mergequant.steps import Steps, choose_steps, one_step, site_parts, split
from optim.quant.run import Report, plan, quantize
from optim.recipes.errors import OptimError
from optim.recipes.schema import Recipe
from optim.runtime.architecture.table import FAMILIES
from optim.runtime.cache.full import Policy
from optim.runtime.decoder.decoder import Decoder
from optim.runtime.engine.load import load_model
from optim.runtime.formats.hadamard import mixing, random_signs
from optim.runtime.formats.static_int import Exact, StaticSite, read_config
from optim.runtime.measure.quality import evaluate_windows
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.storage.size_table import stored
from optim.runtime.walk.static import static_walk
from optim.runtime.walk.walk import Walk

ROTATED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "smollm3")
MIXTURES = ("mixtral", "qwen3_moe")
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "w4a8": {"act_bits": 8},
    "literal": {"rotate": False},
    "no prefix": {"prefix": False},
    "4-bit down": {"down_bits": 4},
}
Make = Callable[..., Path]


@pytest.fixture
def merge(some_text: Path) -> Callable[..., Report]:
    """merge(model, output, **keys of the section) -> the report."""

    def run(model: Path, output: Path, windows: int = 8, **keys: Any) -> Report:
        calibration = {"dataset": str(some_text), "num_samples": windows, "seq_len": 32}
        recipe = {
            "version": 1,
            "model": str(model),
            "output": str(output),
            "calibration": calibration,
            "quantize": {"method": "mergequant"} | keys,
        }
        return quantize(
            plan(Recipe.model_validate(recipe), device="cpu"), lambda at, total, text: None
        )

    return run


def _ids(batch: int, length: int) -> Tensor:
    return torch.randint(3, 259, (batch, length), generator=torch.Generator().manual_seed(2))


@torch.inference_mode()
def _walked(folder: Path, ids: Tensor, path: Path) -> Tensor:
    static = static_walk(open_checkpoint(str(folder)), torch.device("cpu"))
    assert static is not None
    states = static.hidden(ids, path, lambda i: None)
    return static.walk.logits(ids, states[slice(0, len(ids))])


def _exact_cache(folder: Path) -> Any:
    """The model with keys and values in float32: 16 bits would flip a code here and there."""
    model = load_model(str(folder), device="cpu")
    assert isinstance(model.decoder, Decoder)
    model.decoder.cache_dtype = torch.float32
    return model


@torch.inference_mode()
def test_folds_and_turns_change_nothing(make_model: Make, tmp_path: Path) -> None:
    for family in (*ROTATED, *MIXTURES, "gemma2"):
        walk = Walk(open_checkpoint(str(make_model(family))))
        states = walk.embed(_ids(2, 16), tmp_path / family)
        hidden = states[slice(0, 2)]
        block = walk.block(0)
        before = walk.run(0, block, hidden)
        found = places(block, family)
        for site in (found.attention, found.mlp):
            fold_norm(block, site, FAMILIES[family].norm_offset)
        rotation = None if family == "gemma2" else mixing(64, random_signs(64, 0))
        if rotation is not None:
            turn(block, found, rotation)
        turned = hidden if rotation is None else rotation(hidden)
        after = walk.run(0, block, turned)
        after = after if rotation is None else rotation.inverse(after)
        assert (after - before).abs().max() < 2e-5 * before.abs().max(), family


@pytest.mark.parametrize("family_", [*ROTATED, *MIXTURES])
def test_every_family_evaluates_and_runs_the_same(
    family_: str, make_model: Make, merge: Callable[..., Report], tmp_path: Path
) -> None:
    base, out = make_model(family_), tmp_path / "out"
    report = merge(base, out)
    assert all(b["error"] <= b["rounding_error"] for b in report.blocks)
    ids = _ids(2, 20)
    wanted, model = _walked(out, ids, tmp_path / "states"), _exact_cache(out)
    got = model.forward(ids, model.new_cache(batch=2), all_logits=True)
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert "4-bit static" in {row.format for row in stored(open_checkpoint(str(out)))}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_runs_token_by_token_too(
    form: str, make_model: Make, merge: Callable[..., Report], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    merge(make_model("llama"), out, **FORMS[form])
    ids = _ids(1, 12)
    wanted, model = _walked(out, ids, tmp_path / "states"), _exact_cache(out)
    cache = model.new_cache()
    steps = torch.stack([model.forward(ids[:, i : i + 1], cache)[0] for i in range(12)])
    assert (steps - wanted[0]).abs().max() < 1e-4 * wanted.abs().max()
    assert cache.length == 12
    found = read_config(open_checkpoint(str(out)).quantization)
    assert found is not None and bool(found.prefix) == (form != "no prefix")


def test_gemma_unrotated(make_model: Make, merge: Callable[..., Report], tmp_path: Path) -> None:
    merge(make_model("gemma2"), tmp_path / "out", rotate=False)
    ids = _ids(2, 20)
    wanted, model = _walked(tmp_path / "out", ids, tmp_path / "s"), _exact_cache(tmp_path / "out")
    got = model.forward(ids, model.new_cache(batch=2), all_logits=True)
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_padded_batches_see_the_prefix(
    make_model: Make, merge: Callable[..., Report], tmp_path: Path
) -> None:
    merge(make_model("llama"), tmp_path / "out")
    model, ids = _exact_cache(tmp_path / "out"), _ids(1, 9)
    alone = model.forward(ids, model.new_cache(), all_logits=True)[0]
    rows = torch.cat((torch.cat((torch.zeros(1, 3, dtype=torch.int64), ids), 1), _ids(1, 12)))
    cache = model.new_cache(batch=2, padding=[3, 0])
    together = model.forward(rows[:, :-1], cache, all_logits=True)[0]
    last = model.forward(rows[:, -1:], cache)[0]
    assert torch.allclose(together[3:], alone[:-1], atol=1e-4)
    assert torch.allclose(last, alone[-1], atol=1e-4)


def test_a_cpu_is_told_what_is_faster(
    make_model: Make, merge: Callable[..., Report], tmp_path: Path
) -> None:
    merge(make_model("llama"), tmp_path / "out")
    assert "static integers" in (load_model(str(tmp_path / "out"), device="cpu").advice or "")
    assert load_model(str(make_model("llama")), device="cpu").advice is None


def test_packed_caches_and_streams(
    make_model: Make, merge: Callable[..., Report], tmp_path: Path
) -> None:
    merge(make_model("llama"), tmp_path / "out", act_bits=8)
    model, ids = load_model(str(tmp_path / "out"), device="cpu"), _ids(1, 16)
    whole = model.forward(ids, model.new_cache())
    eight = model.forward(ids, model.new_cache(policy=Policy(8)))
    assert (eight - whole).abs().max() < 0.1 * whole.abs().max()
    with pytest.raises(OptimError, match="a stream would forget"):
        model.new_cache(policy=Policy(16, "stream"))


def test_a_cache_with_a_prefix_is_saved_and_restored(
    make_model: Make, merge: Callable[..., Report], tmp_path: Path
) -> None:
    merge(make_model("llama"), tmp_path / "out")
    model, ids = _exact_cache(tmp_path / "out"), _ids(1, 8)
    cache, other = model.new_cache(), model.new_cache()
    model.forward(ids[:, :7], cache)
    with torch.inference_mode():
        other.restore(cache.state())
    assert other.length == 7
    assert torch.equal(model.forward(ids[:, 7:], cache), model.forward(ids[:, 7:], other))


def test_killed_runs_end_with_the_same_bytes(
    make_model: Make, merge: Callable[..., Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, whole, resumed = make_model("llama"), tmp_path / "whole", tmp_path / "resumed"
    merge(base, whole)
    from optim.quant.mergequant.solver import MergeSolver

    solve = MergeSolver.solve

    def stop(self: Any, i: int, states: Any) -> Any:
        if i == 1:
            raise KeyboardInterrupt
        return solve(self, i, states)

    with monkeypatch.context() as patch:
        patch.setattr(MergeSolver, "solve", stop)
        with pytest.raises(KeyboardInterrupt):
            merge(base, resumed)
    assert (tmp_path / "resumed.partial").is_dir() and not resumed.exists()
    merge(base, resumed)
    shards = {p.name: p.read_bytes() for p in whole.glob("*.safetensors")}
    assert shards == {p.name: p.read_bytes() for p in resumed.glob("*.safetensors")}


@pytest.mark.parametrize(
    ("family_", "keys", "said"),
    [
        ("olmo2", {}, "no norm before its linears"),
        ("opt", {}, "LayerNorm"),
        ("gpt_neox", {"rotate": False}, "LayerNorm"),
        ("starcoder2", {}, "not in the table"),
        ("gemma3_text", {}, "residual stream cannot be turned"),
    ],
)
def test_families_that_cannot_are_refused_with_the_reason(
    family_: str,
    keys: dict[str, Any],
    said: str,
    make_model: Make,
    merge: Callable[..., Report],
    tmp_path: Path,
) -> None:
    with pytest.raises(OptimError, match=said) as caught:
        merge(make_model(family_), tmp_path / "out", **keys)
    assert caught.value.code == 2 and not list(tmp_path.iterdir())


def test_few_tokens_are_said_beforehand(
    make_model: Make, merge: Callable[..., Report], tmp_path: Path
) -> None:
    report = merge(make_model("llama"), tmp_path / "out", windows=2)
    assert any("damping is raised" in note for note in report.notes)


def test_what_is_not_finite_is_named(
    make_model: Make, merge: Callable[..., Report], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(make_model("llama"), base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][5] = torch.inf
    tensors["model.embed_tokens.weight"][40:] = torch.inf
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OptimError, match="not finite"):
        merge(base, tmp_path / "out", prefix=False)


def test_a_damaged_artifact_is_named(
    make_model: Make, merge: Callable[..., Report], tmp_path: Path
) -> None:
    merge(make_model("llama"), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format_version"] = 9
    path.write_text(json.dumps(config))
    with pytest.raises(OptimError, match="not one of version 1"):
        load_model(str(tmp_path / "out"), device="cpu")


def test_more_bits_diverge_less(
    make_model: Make, merge: Callable[..., Report], tmp_path: Path
) -> None:
    base, kl = make_model("llama"), []
    for bits in (8, 4):
        merge(base, tmp_path / str(bits), act_bits=bits, down_bits=bits, prefix=False)
        artifact = open_checkpoint(str(tmp_path / str(bits)))
        found = evaluate_windows([artifact], open_checkpoint(str(base)), _ids(3, 32), "cpu")
        kl.append(found[0].kl)
    assert kl[0] is not None and kl[1] is not None and 0 < kl[0] < kl[1] < 1


def test_outlier_tokens_become_the_prefix(make_model: Make, tmp_path: Path) -> None:
    """A token made to blow up one down_proj is found, and the fewest outliers are left."""
    checkpoint = open_checkpoint(str(make_model("llama", torch.float32)))
    windows = torch.full((3, 24), 50) + torch.arange(24) % 7
    seen = outliers(checkpoint, windows, [1], tmp_path / "s")
    assert find_prefix(checkpoint, windows, tmp_path / "p")[0] == 1
    assert all(token in windows for token in seen)


def test_steps_are_clipped_for_the_least_error() -> None:
    x = torch.randn(4000, 256, generator=torch.Generator().manual_seed(0))
    x[:, 0], x[:, 1], x[:, 2] = 0, x[:, 1] * 3 + 2, x[:, 2] / 10
    for bits, most in ((4, 0.03), (8, 2e-4)):
        steps = choose_steps(x, bits, centred=True)
        site = StaticSite(site_parts(steps, None), bits, None, Exact())
        assert steps.center is not None
        back = site(x)[0] * steps.step + steps.center
        error = (back - x).square().mean(0) / x.var(0).clamp(min=1e-9)
        assert error.max() < most
    assert one_step(x, 4).step.unique().numel() == 1


def test_split_channels_stand_for_the_same() -> None:
    step = torch.ones(64)
    step[[3, 40]] = torch.tensor([9.0, 30.0])
    columns = split(step)
    assert len(columns.index) > 64 and columns.worth.max() < 12
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)) * 2 * step
    site = StaticSite(site_parts(Steps(step, None), columns), 4, None, Exact())
    codes = site(x)[0] * columns.worth
    back = torch.zeros_like(x).index_add_(1, columns.index, codes)
    inside = (x / step).abs() < 6
    finer = torch.tensor([int((columns.index == i).sum()) for i in range(64)])
    assert ((back - x).abs() <= step / finer * 0.5001)[inside].all()
