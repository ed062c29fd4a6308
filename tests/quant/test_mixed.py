"""Widths for each linear: the knapsack, what is measured, and the recipe that comes out."""

import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optim.cli import main
from optim.quant.grid import nearest, restore
from optim.quant.mixed.divergence import STEP, Judge
from optim.quant.mixed.knapsack import frontier
from optim.quant.mixed.shrink import settled
from optim.recipes.build import build_recipe
from optim.runtime.engine.load import load_model
from optim.runtime.formats.schemes import Scheme
from optim.runtime.storage.dense_view import PlainView
from optim.runtime.storage.manifest import read_manifest
from optim.runtime.storage.open import open_checkpoint

Make = Callable[..., Path]
choice = st.tuples(st.integers(0, 20), st.integers(0, 20))
IN_GGUF = {  # names of the linears whose rows keep their order there
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
items = st.lists(st.lists(choice, min_size=1, max_size=4), min_size=1, max_size=5)


@given(items)
def test_the_frontier_is_what_trying_everything_finds(given: list[list[tuple[int, int]]]) -> None:
    best: dict[int, int] = {}
    for taken in itertools.product(*given):
        size, cost = (sum(column) for column in zip(*taken, strict=True))
        best[size] = min(cost, best.get(size, cost))
    wanted, least = [], None
    for size in sorted(best):
        if least is None or best[size] < least:
            least = best[size]
            wanted.append((size, least))
    found = frontier([tuple(zip(*item, strict=True)) for item in given])  # type: ignore[misc]
    assert list(zip(found.sizes.tolist(), found.costs.tolist(), strict=True)) == wanted
    for at in range(len(found.sizes)):
        taken = [item[k] for item, k in zip(given, found.choices(at), strict=True)]
        assert tuple(map(sum, zip(*taken, strict=True))) == (found.sizes[at], found.costs[at])


def test_divergences_and_shares_are_those_of_autograd_through_the_whole_model(
    make_model: Make, tmp_path: Path
) -> None:
    """Beside transformers' own model with the same weights."""
    import transformers

    checkpoint = open_checkpoint(str(make_model("llama", torch.float32)))
    windows = torch.randint(3, 200, (3, 12), generator=torch.Generator().manual_seed(0))

    def solved(name: str) -> torch.Tensor:
        weight = checkpoint.read(name)
        scheme = Scheme(3, 32, False)
        return restore(*nearest(weight, scheme, torch.bfloat16)) if "_proj" in name else weight

    judge = Judge(checkpoint, windows, tmp_path, torch.device("cpu"), lambda _: None)
    kl, shares = judge.divergence(solved), judge.shares(solved)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.folder)
    own = {n: p for n, p in model.named_parameters() if "_proj" in n}

    def divergence(t: float) -> torch.Tensor:
        for name, parameter in own.items():
            weight = checkpoint.read(name)
            parameter.data.copy_(weight + t * (solved(name) - weight))
        return model(windows).logits[:, STEP - 1 :: STEP].log_softmax(-1)

    base = divergence(0).detach()
    wanted = (base.exp() * (base - divergence(1))).sum(-1).mean()
    assert kl == pytest.approx(float(wanted.detach()), rel=1e-3)
    half = (base.exp() * (base - divergence(0.5))).sum(-1).mean()
    for name, g in zip(own, torch.autograd.grad(half, list(own.values())), strict=True):
        share = float((g * (solved(name) - checkpoint.read(name))).sum())
        assert shares[name.removesuffix(".weight")] == pytest.approx(share, rel=1e-3, abs=1e-7)
    assert sum(shares.values()) == pytest.approx(kl, rel=0.3)


def test_what_the_widths_agree_on_is_the_cost_and_the_rest_is_not_trusted() -> None:
    draw = np.random.default_rng(0)
    own = np.exp(draw.normal(size=200))
    means, kinds = np.array([4.0, 1.0, 0.25]), ["up"] * 100 + ["down"] * 100
    noise = draw.normal(size=(200, 3)) * 2
    found = settled(own[:, None] * means + noise * means, kinds)
    true, measured = own[:, None] * means, (own[:, None] + noise) * means
    assert np.square(found - true).sum() < 0.35 * np.square(measured - true).sum()
    assert (found > 0).all()
    alike = settled(np.tile(own[:, None], (1, 3)) * means, kinds)
    np.testing.assert_allclose(alike, own[:, None] * means, rtol=1e-6, atol=0.1)
    lone = settled(draw.normal(1, 0.5, size=(50, 3)), ["o"] * 50)
    assert lone.std(0).max() < 0.2  # of which the measured ones have 0.5


def run(*words: object) -> int:
    with pytest.MonkeyPatch.context() as patch, open(os.devnull) as nothing:
        patch.setattr(sys, "stdin", nothing)
        patch.setattr(sys, "argv", ["optim", *map(str, words)])
        return main()


@pytest.fixture
def words(some_text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[object, ...]:
    monkeypatch.setenv("OPTIM_CACHE", str(tmp_path / "cache"))
    return ("--calibration", some_text, "--num-samples", 2, "--seq-len", 64, "--quiet", "-m", "rtn")


def test_the_plan_meets_its_budget_and_its_recipe_makes_that(
    make_model: Make, words: tuple[object, ...], tmp_path: Path, capfd
) -> None:
    place, out = tmp_path / "plan.yaml", tmp_path / "out"
    model = make_model("llama")
    assert run("plan", model, "--bits", 4.6, *words, "-o", place, "--json") == 0
    made = json.loads(capfd.readouterr().out)
    assert 4.6 * 0.95 <= made["chosen"]["bits"] <= 4.6  # it has eight units alone
    assert run("apply", place, "-o", out, "--quiet", "--no-eval") == 0
    manifest = read_manifest(out)
    assert manifest is not None and manifest.bytes == made["chosen"]["nbytes"]
    assert len({kind[:5] for kind in manifest.modules.values()}) > 1
    fit = made["chosen"]["nbytes"]
    assert run("plan", model, "--fit", f"{fit}B", *words, "-o", tmp_path / "fit.yaml") == 0
    assert build_recipe(str(tmp_path / "fit.yaml")) == build_recipe(str(place))


def test_stopped_it_says_that_nothing_was_written(
    make_model: Make,
    words: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd,
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("optim.quant.mixed.run._plan", stopped)
    loud = [word for word in words if word != "--quiet"]
    assert run("plan", make_model("llama"), "--bits", 4, *loud, "-o", tmp_path / "p.yaml") == 130
    assert "stopped; nothing was written" in capfd.readouterr().err
    assert not (tmp_path / "p.yaml").exists() and not list((tmp_path / "cache").glob("tmp*"))


def test_linears_that_are_computed_as_one_have_one_width(
    make_model: Make, words: tuple[object, ...], tmp_path: Path
) -> None:
    from optim.quant.plan import plan

    place = tmp_path / "plan.yaml"
    assert run("plan", make_model("qwen3_moe"), "--bits", 5, *words, "-o", place) == 0
    schemes = plan(build_recipe(str(place))).schemes
    for block in range(2):
        own = {k: v for k, v in schemes.items() if f".{block}." in k.partition("layers")[2][:3]}
        assert len({v for k, v in own.items() if k.endswith(("q_proj", "k_proj", "v_proj"))}) <= 1
        assert len({v for k, v in own.items() if ".experts." in k}) <= 1


@pytest.mark.parametrize("lossless", [[], ["--lossless"]])
def test_a_divergence_is_a_budget_too(
    make_model: Make, words: tuple[object, ...], tmp_path: Path, lossless: list[str], capfd
) -> None:
    place = tmp_path / "plan.yaml"
    asked = ("--max-kl", 0.05, *lossless, "-o", place, "--json")
    assert run("plan", make_model("llama"), *asked, *words) == 0
    made = json.loads(capfd.readouterr().out)
    assert 0 < made["chosen"]["kl"] <= 0.05
    assert all(p["nbytes"] > made["chosen"]["nbytes"] for p in made["uniform"] if p["kl"] <= 0.05)
    assert ("pack" in made["recipe"]) == bool(lossless)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ((), "a plan needs one budget"),
        (("--bits", 3, "--fit", "1GB"), "a plan needs one budget"),
        (("--fit", "1kB"), "no choice of widths is so small"),
        (("--fit", "6"), "must be a size"),
        (("--bits", 16), "fits without any quantization"),
        (("--device", "1kB"), "a text of 4,096 tokens alone takes"),
        (("--bits", 3, "-m", "mergequant"), "has one width for all"),
        (("--bits", 3, "--widths", "5"), "must be some of 2, 3, 4, 8"),
        (("--bits", 3, "-g", 48), "group_size"),
        (("--bits", 3, "--plot", "it.jpg"), "cannot be written as a picture"),
    ],
)
def test_budgets_that_cannot_be(
    make_model: Make, words: tuple[object, ...], tmp_path: Path, asked: tuple, said: str, capfd
) -> None:
    place = tmp_path / "plan.yaml"
    assert run("plan", make_model("llama"), *words, *asked, "-o", place) == 2
    assert said in " ".join(capfd.readouterr().err.split())
    assert not place.exists()


def test_a_device_has_room_for_its_caches_and_a_picture_is_drawn(
    make_model: Make, words: tuple[object, ...], tmp_path: Path, capfd
) -> None:
    pytest.importorskip("matplotlib")
    place, picture = tmp_path / "plan.yaml", tmp_path / "it.png"
    asked = ("--device", "400kB", "--context", 128, "-o", place, "--plot", picture, "--json")
    assert run("plan", make_model("llama"), *asked, *words) == 0
    made = json.loads(capfd.readouterr().out)
    cache = 2 * 2 * 2 * 16 * 128 * 2
    assert made["chosen"]["nbytes"] < 400_000 - cache
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_mixed_widths_load_in_transformers_and_go_into_a_gguf_file(
    make_model: Make, words: tuple[object, ...], tmp_path: Path
) -> None:
    import transformers

    place, out = tmp_path / "plan.yaml", tmp_path / "out"
    asked = ("--bits", 6, "--sym", "--widths", "4,8", "-o", place)
    assert run("plan", make_model("llama"), *asked, *words) == 0
    sets = ("--set", "export.format=gguf", "--set", "export.pre=gpt-2")
    assert run("apply", place, "-o", out, *sets, "--quiet", "--no-eval") == 0
    ours = PlainView(open_checkpoint(str(out)))
    read = {t.name: t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    kinds = set()
    for i, (path, name) in itertools.product(range(2), IN_GGUF.items()):
        tensor = read[f"blk.{i}.{name}.weight"]
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        kinds.add(tensor.tensor_type.name)
        wanted = ours.read(f"model.layers.{i}.{path}.weight").numpy()
        np.testing.assert_array_equal(weight, wanted)
    assert kinds == {"Q4_0", "Q8_0"}
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.arange(3, 20)[None]
    wanted = model(ids).logits[0].detach()
    runs = load_model(str(out), device="cpu")
    logits = runs.forward(ids, runs.new_cache(), all_logits=True)[0]
    assert torch.nn.functional.cosine_similarity(logits.float(), wanted, -1).min() > 0.999
