"""Core neurons: the compact feed-forward is the masked dense one, and the decoder's choices."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from optim.prune.run import Report
from optim.runtime.core_decoder import CoreDecoder
from optim.runtime.model import Model, load_model

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
