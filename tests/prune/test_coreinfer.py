"""Core neurons: the compact feed-forward is the masked dense one, and the decoder's choices."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from optim.prune.run import Report
from optim.runtime.checkpoint import open_checkpoint
from optim.runtime.core_decoder import CoreDecoder
from optim.runtime.model import Model, load_model
from optim.runtime.plain import PlainView
from optim.runtime.side import read_side
from optim.runtime.sparsity import SparseWalk
from optim.runtime.walk import Walk

Prune = Callable[..., Report]
MakeModel = Callable[..., Path]

IDS = torch.randint(5, 250, (1, 40), generator=torch.Generator().manual_seed(1))


def decode(model: Model, prompt: int) -> torch.Tensor:
    """Logits after each of IDS from `prompt` on, decoded one by one: `[tokens, vocab]`."""
    cache = model.new_cache(length=64)
    logits = [model.forward(IDS[:, :prompt], cache)]
    logits += [model.forward(IDS[:, i : i + 1], cache) for i in range(prompt, IDS.shape[1])]
    return torch.cat(logits)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_keeping_all_neurons_is_the_dense_model(
    family: str, make_model: MakeModel, pruned: Prune, tmp_path: Path
) -> None:
    source = make_model(family, torch.float32)
    pruned(source, tmp_path / "out", "coreinfer", keep=1.0)
    sparse = decode(load_model(str(tmp_path / "out")), 20)
    dense = decode(load_model(str(source)), 20)
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
@pytest.mark.parametrize("keys", [{}, {"score": "griffin", "prior": False}, {"clusters": 2}])
def test_the_compact_feed_forward_is_the_masked_dense_one(
    family: str, keys: dict[str, Any], make_model: MakeModel, pruned: Prune, tmp_path: Path
) -> None:
    pruned(make_model(family, torch.float32), tmp_path / "out", "coreinfer", keep=0.5, **keys)
    model = load_model(str(tmp_path / "out"))
    got = decode(model, 20)
    assert isinstance(model.decoder, CoreDecoder)
    assert model.decoder.state == "sparse"
    wanted = walked(str(tmp_path / "out"), 20)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def walked(source: str, prompt: int) -> torch.Tensor:
    """Logits after each of IDS from `prompt` on as evaluation computes them: `[tokens, vocab]`."""
    checkpoint = open_checkpoint(source)
    side = read_side(checkpoint)
    assert side is not None
    with torch.inference_mode(), TemporaryDirectory() as folder:
        walk = Walk(PlainView(checkpoint))
        sparse = SparseWalk(walk, side, prompt)
        states = walk.embed(IDS, Path(folder) / "states")
        for i in range(len(walk)):
            states[slice(0, 1)] = walk.run(i, sparse.block(i), states[slice(0, 1)])
        return walk.logits(IDS, states[slice(0, 1)])[0, prompt - 1 :]
