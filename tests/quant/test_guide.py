"""Guided solving: the weights of tokens, the Gram matrices they make, and the whole run."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optim.quant import block_solver
from optim.quant.guide import Guide, compared, effective, held_back, tempered
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
    got = tempered(weights, StoredLinear(torch.zeros(4, 32), None))
    assert torch.allclose(got[:, 0], even)
    assert torch.allclose(got[:, 1] / got[0, 1], (spiked / spiked[0]).sqrt(), rtol=1e-4)
    assert torch.allclose(got.mean(0), weights.mean(0))
    one = torch.zeros(400)
    one[3] = 7.0  # a single token: no power above zero helps
    got = tempered(one[:, None], StoredLinear(torch.zeros(4, 32), None))
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
        weights = Guide(found, 3, {}).block(0, block).weights
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
    first, second = report.blocks
    assert manifest["blocks"][0]["held_back"] == first["held_back"]
    assert first["held_back"]["guided"] > 0 and first["held_back"]["unguided"] > 0
    assert second["held_back"] is None, "one block of sixteen is compared"
    worse = math.log(first["held_back"]["guided"] / first["held_back"]["unguided"])
    worse = worse > 2 * first["held_back"]["error"]
    said = [note for note in report.notes if ": unguided: guiding has clearly" in note]
    assert len(said) == worse, "one note for both blocks"
    assert not (tmp_path / "out.partial").exists()


def _nonsense(weights: Tensor, linear: StoredLinear) -> Tensor:
    only = torch.full_like(weights, 1e-6)
    only[:3] = 1e3
    return only


def _shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_what_lost_on_held_back_text_is_not_done(
    make_model: MakeModel, compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that say nothing true lose in the first block: all is as unguided, to the byte, and
    so it is where the run is killed between the check and the blocks that follow it."""
    monkeypatch.setattr("optim.quant.guide.tempered", _nonsense)
    model = make_model("llama")
    report = compress(model, tmp_path / "out", guide="loss")
    costs = report.blocks[0]["held_back"]
    assert math.log(costs["guided"] / costs["unguided"]) > 2 * costs["error"]
    assert any(note.startswith("blocks 0, 1: unguided: guiding") for note in report.notes)
    compress(model, tmp_path / "plain")
    assert _shards(tmp_path / "out") == _shards(tmp_path / "plain")
    solve = block_solver.BlockSolver.solve

    def once(self: Any, i: int, states: Any) -> Any:
        if i == 1:
            raise KeyboardInterrupt
        return solve(self, i, states)

    with monkeypatch.context() as patch:
        patch.setattr(block_solver.BlockSolver, "solve", once)
        with pytest.raises(KeyboardInterrupt):
            compress(model, tmp_path / "again", guide="loss")
    again = compress(model, tmp_path / "again", guide="loss")
    assert again.blocks[0]["held_back"] == costs
    assert _shards(tmp_path / "again") == _shards(tmp_path / "plain")


def test_guiding_ends_where_it_is_clearly_worse() -> None:
    found = ReverseWalk.__new__(ReverseWalk)
    found.windows = torch.zeros(16, 4)
    guide = Guide(found, 14, {})
    assert [i for i in range(40) if guide.checks_at(i)] == [0, 16, 32]
    assert guide.pays
    guide.checks[0] = {"guided": 0.3, "unguided": 0.2, "error": 0.3}
    assert guide.pays, "log 1.5 = 0.41 is less than two standard errors"
    guide.checks[0]["error"] = 0.2
    assert not guide.pays
    guide.checks[16] = {"guided": 0.2, "unguided": 0.2, "error": 0.1}
    assert guide.pays, "0.41 of two checks, error 0.22"
    assert not Guide(found, 16, {}, checking=False).checks_at(0)


def test_the_error_of_a_comparison_is_that_of_pairs() -> None:
    """What both ways share, stretches that cost more, is no error; of one stretch all is unknown
    but the sums."""
    cost = torch.rand(1000, generator=torch.Generator().manual_seed(0)).double() * 9 + 1
    got = compared(cost * 2, cost, cost * 4)
    assert got == pytest.approx({"guided": 0.5, "unguided": 0.25, "error": 0})
    draws = torch.Generator().manual_seed(1)
    logs = []
    for _ in range(400):
        noise = torch.rand(2, 50, generator=draws).double() + 0.5
        pair = compared(*(cost[:50] * noise), cost[:50])
        logs.append(math.log(pair["guided"] / pair["unguided"]))
    spread = torch.tensor(logs).std()
    assert 0.8 < pair["error"] / float(spread) < 1.25


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
    assert _shards(tmp_path / "out") == _shards(tmp_path / "whole") != {}


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
