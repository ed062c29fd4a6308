"""Core neurons: the compact feed-forward is the masked dense one, and the decoder's choices."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from optim.prune.run import Report
from optim.runtime.engine.load import Model, load_model
from optim.runtime.sparsity.core_decoder import CoreDecoder

Prune = Callable[..., Report]
MakeModel = Callable[..., Path]
Decoded = Callable[[Model, int], torch.Tensor]
Evaluated = Callable[[str, int], torch.Tensor]


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_keeping_all_neurons_is_the_dense_model(
    family: str, make_model: MakeModel, pruned: Prune, tmp_path: Path, decoded: Decoded
) -> None:
    source = make_model(family, torch.float32)
    pruned(source, tmp_path / "out", "coreinfer", keep=1.0)
    sparse = decoded(load_model(str(tmp_path / "out")), 20)
    dense = decoded(load_model(str(source)), 20)
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
@pytest.mark.parametrize("keys", [{}, {"score": "griffin", "prior": False}, {"clusters": 2}])
def test_the_compact_feed_forward_is_the_masked_dense_one(
    family: str,
    keys: dict[str, Any],
    make_model: MakeModel,
    pruned: Prune,
    tmp_path: Path,
    decoded: Decoded,
    evaluated: Evaluated,
) -> None:
    pruned(make_model(family, torch.float32), tmp_path / "out", "coreinfer", keep=0.5, **keys)
    model = load_model(str(tmp_path / "out"))
    got = decoded(model, 20)
    assert isinstance(model.decoder, CoreDecoder)
    assert model.decoder.state == "sparse"
    wanted = evaluated(str(tmp_path / "out"), 20)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_the_guard_gives_up_a_choice_that_moves_the_logits(
    make_model: MakeModel, pruned: Prune, tmp_path: Path, decoded: Decoded
) -> None:
    source = make_model("llama", torch.float32)
    dense = decoded(load_model(str(source)), 20)
    for limit, state in ((1e-9, "given up"), (1e9, "sparse")):
        pruned(source, tmp_path / state, "coreinfer", keep=0.3, max_kl=limit)
        model = load_model(str(tmp_path / state))
        got = decoded(model, 20)
        assert isinstance(model.decoder, CoreDecoder)
        assert model.decoder.state == state and (model.decoder.kl or 0) > 1e-6
        same = torch.allclose(got, dense, rtol=1e-4, atol=1e-4)
        assert same is (state == "given up")


def test_refresh_chooses_again(
    make_model: MakeModel, pruned: Prune, tmp_path: Path, decoded: Decoded
) -> None:
    source = make_model("llama", torch.float32)
    chosen = {}
    for every in (0, 8):
        pruned(source, tmp_path / str(every), "coreinfer", keep=0.3, prior=False, refresh=every)
        chosen[every] = decoded(load_model(str(tmp_path / str(every))), 20)
    assert torch.equal(chosen[0][:9], chosen[8][:9])
    assert not torch.allclose(chosen[0][9:], chosen[8][9:], rtol=1e-3, atol=1e-3)


def test_batches_and_other_caches_run_densely(
    make_model: MakeModel, pruned: Prune, tmp_path: Path
) -> None:
    source = make_model("llama", torch.float32)
    pruned(source, tmp_path / "out", "coreinfer", keep=0.3)
    models = [load_model(str(folder)) for folder in (tmp_path / "out", source)]
    ids = torch.randint(5, 250, (2, 12), generator=torch.Generator().manual_seed(3))
    both = []
    for model in models:
        cache = model.new_cache(batch=2, length=32)
        model.forward(ids, cache)
        both.append(model.forward(ids[:, :1], cache))
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)


def test_a_measured_budget_is_kept_and_uneven(
    make_model: MakeModel, pruned: Prune, tmp_path: Path
) -> None:
    report = pruned(make_model("llama", torch.float32), tmp_path / "out", "coreinfer", keep=0.5)
    keeps = [block["keep"] for block in report.blocks]
    assert sum(keeps) / len(keeps) == pytest.approx(0.5)
    assert all(block["kl_alone"] > 0 for block in report.blocks)
