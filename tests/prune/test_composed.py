"""Sparsity over int4 weights: the side file beside what `optim quantize` wrote."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from optim.prune.run import Report
from optim.quant.run import plan, quantize
from optim.recipes.schema import Recipe
from optim.runtime.decoder.decoder import Decoder
from optim.runtime.decoder.linears import sparse
from optim.runtime.decoder.linears.sparse import SparseLinear
from optim.runtime.engine.load import Model, load_model
from optim.runtime.kernels.cpu import skip_int4
from optim.runtime.sparsity.core_decoder import CoreDecoder

Prune = Callable[..., Report]
MakeModel = Callable[..., Path]
Decoded = Callable[[Model, int], torch.Tensor]
Evaluated = Callable[[str, int], torch.Tensor]


@pytest.fixture
def int4(make_model: MakeModel, tmp_path: Path) -> Path:
    """A llama rounded to 4 bits, groups of 32."""
    section = {"method": "rtn", "bits": 4, "group_size": 32}
    source, output = str(make_model("llama")), str(tmp_path / "int4")
    recipe = {"version": 1, "model": source, "output": output, "quantize": section}
    quantize(plan(Recipe.model_validate(recipe), device="cpu"), lambda at, total, text: None)
    return tmp_path / "int4"


def near(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Up to the rounding of activations to 8 bits."""
    return float((got - wanted).norm() / wanted.norm()) < 0.08


@pytest.mark.skipif(not skip_int4.usable(), reason="no C compiler")
def test_thresholds_over_int4(
    int4: Path,
    pruned: Prune,
    tmp_path: Path,
    decoded: Decoded,
    evaluated: Evaluated,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sparse, "SHORT", 0)  # the model is too small for it to pay
    pruned(int4, tmp_path / "out", "threshold", sparsity=0.5)
    model = load_model(str(tmp_path / "out"))
    wanted = evaluated(str(tmp_path / "out"), 20)
    dense = decoded(load_model(str(int4)), 20)
    # Activations are rounded, and fall on the other side of a threshold now and then.
    assert (decoded(model, 20) - wanted).norm() < 0.7 * (dense - wanted).norm()
    assert isinstance(model.decoder, Decoder)
    linear = model.decoder.blocks[0].attention.qkv
    assert isinstance(linear, SparseLinear) and isinstance(linear.columns, skip_int4.Columns)
    assert model.token_bytes < 0.9 * model.weight_bytes


def test_threshold_0_over_int4_is_int4(
    int4: Path, pruned: Prune, tmp_path: Path, decoded: Decoded
) -> None:
    pruned(int4, tmp_path / "out", "threshold", sparsity=0.0)
    dense = decoded(load_model(str(int4)), 1)  # all is decoded: activations of 8 bits throughout
    sparse = decoded(load_model(str(tmp_path / "out")), 1)
    torch.testing.assert_close(sparse, dense, rtol=1e-2, atol=1e-2)


def test_core_neurons_over_int4(
    int4: Path, pruned: Prune, tmp_path: Path, decoded: Decoded, evaluated: Evaluated
) -> None:
    pruned(int4, tmp_path / "out", "coreinfer", keep=0.5)
    model = load_model(str(tmp_path / "out"))
    assert near(decoded(model, 20), evaluated(str(tmp_path / "out"), 20))
    assert isinstance(model.decoder, CoreDecoder) and model.token_bytes < 0.9 * model.weight_bytes


@pytest.mark.skipif(not skip_int4.usable(), reason="no C compiler")
@pytest.mark.parametrize(
    ("method", "options", "short"),
    [
        ("threshold", {"sparsity": 0.5}, 0),
        ("threshold", {"sparsity": 0.5}, 10000),
        ("coreinfer", {"keep": 0.5, "budget": "uniform"}, 0),
    ],
)
def test_sparse_int4_goes_through_all_blocks_in_one_call(
    method: str,
    options: dict[str, object],
    short: int,
    int4: Path,
    pruned: Prune,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sparse, "SHORT", short)
    pruned(int4, tmp_path / "out", method, **options)
    model = load_model(str(tmp_path / "out"))
    inner = model.decoder.inner if isinstance(model.decoder, CoreDecoder) else model.decoder
    assert isinstance(inner, Decoder)
    ids, found = torch.arange(3, 40)[None], []
    for blocks_apart in (False, True):
        cache = model.new_cache()
        model.forward(ids[:, :30], cache)
        for at in range(30, 37):
            if blocks_apart:
                inner.one_call = None
                if isinstance(model.decoder, CoreDecoder):
                    model.decoder._calls["sparse"] = None
            else:
                assert at == 30 or inner.one_call is not None
            found.append(model.forward(ids[:, at : at + 1], cache))
    together, apart = torch.cat(found).chunk(2)
    torch.testing.assert_close(together, apart, rtol=2e-3, atol=2e-3)
