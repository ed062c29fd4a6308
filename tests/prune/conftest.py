"""Models pruned with a few tokens; what they decode, and what evaluation makes of them."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from optim.prune.run import Report, plan, prune
from optim.recipes.schema import Recipe
from optim.runtime.engine.load import Model
from optim.runtime.sparsity.rules import SparseWalk
from optim.runtime.sparsity.side_file import read_side
from optim.runtime.storage.dense_view import PlainView
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.walk.walk import Walk

Prune = Callable[..., Report]
IDS = torch.randint(5, 250, (1, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def make_recipe(some_text: Path) -> Callable[..., Recipe]:
    """make_recipe(model, output, method, **keys of the section)."""

    def make(model: Path, output: Path, method: str, **keys: Any) -> Recipe:
        calibration = {"dataset": str(some_text), "num_samples": 4, "seq_len": 32}
        return Recipe.model_validate(
            {
                "version": 1,
                "model": str(model),
                "output": str(output),
                "calibration": calibration,
                "prune": {"method": method, **keys},
            }
        )

    return make


@pytest.fixture
def pruned(make_recipe: Callable[..., Recipe]) -> Prune:
    """pruned(model, output, method, **keys) prunes and returns the report."""

    def run(model: Path, output: Path, method: str, **keys: Any) -> Report:
        recipe = make_recipe(model, output, method, **keys)
        return prune(plan(recipe, device="cpu"), lambda at, total, text: None)

    return run


@pytest.fixture
def decoded() -> Callable[[Model, int], torch.Tensor]:
    """decoded(model, prompt): logits after IDS from `prompt` on, one by one `[tokens, vocab]`."""

    def decode(model: Model, prompt: int) -> torch.Tensor:
        cache = model.new_cache(length=64)
        logits = [model.forward(IDS[:, :prompt], cache)]
        logits += [model.forward(IDS[:, i : i + 1], cache) for i in range(prompt, IDS.shape[1])]
        return torch.cat(logits)

    return decode


@pytest.fixture
def evaluated() -> Callable[[str, int], torch.Tensor]:
    """evaluated(folder, prompt): the same logits as evaluation computes them."""

    def walk_through(source: str, prompt: int) -> torch.Tensor:
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

    return walk_through
