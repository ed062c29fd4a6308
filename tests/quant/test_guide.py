"""Guided solving: the weights of tokens, the Gram matrices they make, and the whole run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optim.quant import block_solver
from optim.quant.guide import Guide, effective, held_back, tempered
from optim.quant.observe import observe
from optim.quant.plan import plan
from optim.quant.rounding import row_groups
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.storage.workspace import KEPT
from optim.runtime.walk.reverse import ReverseWalk
from optim.runtime.walk.walk import StoredLinear, Walk, linears

MakeModel = Callable[..., Path]
Compress = Callable[..., Any]


def _ids(batch: int, length: int) -> Tensor:
    return torch.randint(3, 264, (batch, length), generator=torch.Generator().manual_seed(1))


def test_kish() -> None:
    assert effective(torch.ones(10)) == pytest.approx(10)
    assert effective(torch.tensor([5.0, 0, 0, 0])) == pytest.approx(1)
    assert effective(torch.tensor([1.0, 1, 0, 0])) == pytest.approx(2)


def test_few_effective_tokens_are_tempered() -> None:
    """As far as needed and no further, each group by itself; the mean stays."""
    even = torch.rand(400, generator=torch.Generator().manual_seed(0)) + 0.5
    spiked = torch.randn(400, generator=torch.Generator().manual_seed(1)).mul(2.5).exp()
    assert effective(spiked) < 32 < effective(spiked**0.5) < effective(even)
    weights = torch.stack((even, spiked), 1)
    got = tempered(weights, 400, StoredLinear(torch.zeros(4, 32), None))
    assert torch.allclose(got[:, 0], even)
    assert torch.allclose(got[:, 1] / got[0, 1], (spiked / spiked[0]).sqrt(), rtol=1e-4)
    assert torch.allclose(got.mean(0), weights.mean(0))
    one = torch.zeros(400)
    one[3] = 7.0  # a single token: no power above zero helps
    got = tempered(one[:, None], 400, StoredLinear(torch.zeros(4, 32), None))
    assert torch.allclose(got, torch.full((400, 1), 7 / 400))


def test_what_is_held_back() -> None:
    assert [held_back(n) for n in (1, 2, 16, 64, 512)] == [0, 1, 2, 8, 8]


@pytest.mark.parametrize("groups", [1, 3])
def test_weighted_grams(groups: int, make_model: MakeModel, tmp_path: Path) -> None:
    """Σ_t w_tc x_t x_tᵀ over the fitted windows alone, by hand; of experts, what they read."""
    checkpoint, ids = open_checkpoint(str(make_model("qwen3_moe"))), _ids(4, 16)
    found = ReverseWalk(checkpoint, ids, tmp_path / "guide", groups, kept=1)
    found.run()
    walk = Walk(checkpoint)
    with torch.inference_mode():
        states = walk.embed(ids, tmp_path / "states")
        block = walk.block(0)
        weights = Guide(found, 3).block(0, block).weights
        names = set(linears(block))
        seen = observe(walk, 0, block, states, names, None, weights, 3)
        inputs: dict[str, Tensor] = {}
        for name in names:
            block.get_submodule(name).register_forward_pre_hook(
                lambda _m, args, name=name: inputs.update({name: args[0].flatten(0, -2)})
            )
        walk.run(0, block, states[slice(0, 3)])
        chosen = block.get_submodule("mlp.experts").chosen
    compared = 0
    for name, x in inputs.items():
        share = weights[name][: 3 * 16]
        if ".experts." in name:
            share = share[(chosen == int(name.split(".")[2])).any(-1)]
        assert len(seen[name].grams) == groups and seen[name].tokens == len(x)
        for k, gram in enumerate(seen[name].grams):
            wanted = (x * share[:, k, None]).T @ x / len(x)
            assert torch.allclose(gram, wanted, atol=1e-5 * float(wanted.abs().max()))
            compared += 1
    assert compared >= 10 * groups


def test_row_groups_are_those_of_the_gradients() -> None:
    for rows, groups in ((10, 3), (7, 7), (64, 1), (5, 2)):
        wanted = [part.tolist() for part in torch.arange(rows).tensor_split(groups)]
        assert [list(range(rows))[part] for part in row_groups(rows, groups)] == wanted


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("llama", {"method": "awq"}),
        ("gemma3_text", {"method": "gptq", "guide_groups": 3}),
        ("mixtral", {"method": "awq", "guide_groups": 2}),
        ("qwen2", {"method": "awq", "compensate": False}),
    ],
)
def test_a_guided_run(
    kind: str, keys: dict[str, Any], make_model: MakeModel, compress: Compress, tmp_path: Path
) -> None:
    report = compress(make_model(kind), tmp_path / "out", guide="loss", **keys)
    manifest = json.loads((tmp_path / "out" / "optim.json").read_text())
    for block, noted in zip(report.blocks, manifest["blocks"], strict=True):
        costs = block["held_back"]
        assert noted["held_back"] == costs
        assert costs["guided"] > 0 and costs["unguided"] > 0
    worse = [
        k
        for k, b in enumerate(report.blocks)
        if b["held_back"]["guided"] > b["held_back"]["unguided"]
    ]
    said = [note for note in report.notes if ": unguided: guided costs more" in note]
    assert len(said) == len(worse)
    assert not (tmp_path / "out.partial").exists()


def test_the_worse_of_the_two_is_not_kept(
    make_model: MakeModel, compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that say nothing true lose on held-back text, and the unguided block is kept."""

    def nonsense(weights: Tensor, tokens: int, linear: StoredLinear) -> Tensor:
        only = torch.full_like(weights, 1e-6)
        only[:3] = 1e3
        return only

    monkeypatch.setattr("optim.quant.guide.tempered", nonsense)
    report = compress(make_model("llama"), tmp_path / "out", guide="loss")
    lost = [
        i
        for i, block in enumerate(report.blocks)
        if block["held_back"]["guided"] > block["held_back"]["unguided"]
    ]
    assert lost
    for i in lost:
        assert any(n.startswith(f"block {i}: unguided: guided costs more") for n in report.notes)
        assert report.blocks[i]["error"] < report.blocks[i]["rounding_error"]


def test_an_interrupted_reverse_walk_is_kept(
    make_model: MakeModel, compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(make_model("llama"), tmp_path / "whole", guide="loss")

    def stop(*_args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(block_solver.BlockSolver, "solve", stop)
        with pytest.raises(KeyboardInterrupt):
            compress(make_model("llama"), tmp_path / "out", guide="loss")
    kept = tmp_path / "out.partial" / KEPT
    assert len(list(kept.glob("block-*"))) == 2
    monkeypatch.setattr(ReverseWalk, "_block", stop)  # nothing of it is done again
    compress(make_model("llama"), tmp_path / "out", guide="loss")
    names = [p.name for p in (tmp_path / "whole").glob("*.safetensors")]
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert names


def test_the_plan_says_what_it_costs(
    make_model: MakeModel, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_model("llama")
    plain = plan(make_recipe(model, tmp_path / "out"), device="cpu")
    guided = plan(make_recipe(model, tmp_path / "out", guide="loss"), device="cpu")
    state = 4 * 4 * 32 * 64
    assert guided.disk_bytes - plain.disk_bytes >= (2 + 3) * state
    assert guided.peak_bytes > plain.peak_bytes
    assert [n for n in guided.notes if n.startswith("guide loss first walks the model")]
    assert not [n for n in plain.notes if "guide loss" in n]
