"""A model pruned with a few hundred tokens, and the same recipe for any model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optim.prune.run import Report, plan, prune
from optim.recipes.schema import Recipe

Prune = Callable[..., Report]


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
