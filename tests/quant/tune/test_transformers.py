"""What transformers reads of mixed and tuned artifacts, through compressed-tensors: our logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from optim.quant.tune.run import tune
from optim.quant.tune.train import Asked
from optim.recipes.schema import Calibration
from optim.runtime.storage.dense_view import PlainView
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.walk.walk import Walk

DOWN = {"targets": ["re:.*down_proj"], "bits": 8, "group_size": -1}
FIRST = {"targets": ["re:.*layers.0.mlp.(gate|up)_proj"], "bits": 3}


def _ours(folder: Path, ids: Tensor, path: Path) -> Tensor:
    """Logits of every token, block by block, over the weights that the integers stand for."""
    walk = Walk(PlainView(open_checkpoint(str(folder))))
    states = walk.embed(ids, path)
    x = states[slice(0, len(ids))]
    for i in range(len(walk)):
        x = walk.run(i, walk.block(i), x)
    return walk.logits(ids, x)


@pytest.mark.parametrize(
    "keys",
    [
        {"sym": True, "guide": "loss", "sweeps": 1, "overrides": [DOWN, FIRST]},
        {"bits": 3, "sweeps": 1},
        {"bits": 2},
    ],
)
def test_mixed_and_tuned(
    keys: dict[str, Any],
    make_model: Callable[..., Path],
    compress: Callable[..., Any],
    some_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Formats that are mixed are symmetric: transformers takes no others."""
    monkeypatch.setattr("optim.quant.tune.train.held_back", lambda windows: 0)
    base, made, tuned = make_model("llama", torch.float32), tmp_path / "made", tmp_path / "tuned"
    compress(base, made, **keys)
    text = Calibration(dataset=str(some_text), num_samples=4, seq_len=32)
    places = (str(made), str(base), str(tuned))
    report = tune(*places, text, Asked(2, 5e-3), lambda at, total, text: None, device="cpu")
    assert min(report.kl) < report.kl[0]
    ids, found = torch.arange(5, 37)[None], list[Tensor]()
    for folder in (made, tuned):
        with torch.no_grad():
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
            ours = _ours(folder, ids, tmp_path / "states")
        assert torch.allclose(theirs, ours, rtol=1e-5, atol=1e-5)
        found.append(theirs)
    assert (found[0] - found[1]).norm() > 1e-2 * found[0].norm()
