"""A whole run on a tiny model; one thread, because two wait for each other on small tensors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optim.quant.run import Report, plan, quantize
from optim.recipes.schema import Recipe

Compress = Callable[..., Report]


@pytest.fixture(autouse=True)
def _alone(one_thread: None) -> None:
    pass


@pytest.fixture
def make_recipe(some_text: Path) -> Callable[..., Recipe]:
    """make_recipe(model, output, method="awq", **quantize keys); 4 windows of 32 tokens."""

    def make(model: Path, output: Path, method: str = "awq", **keys: Any) -> Recipe:
        calibration = {"dataset": str(some_text), "num_samples": 4, "seq_len": 32}
        return Recipe.model_validate(
            {
                "version": 1,
                "model": str(model),
                "output": str(output),
                "calibration": calibration,
                "quantize": {"method": method, "group_size": 32} | keys,
            }
        )

    return make


@pytest.fixture
def compress(make_recipe: Callable[..., Recipe]) -> Compress:
    """compress(model, output, **as make_recipe) -> the report; resumes like the command."""

    def run(model: Path, output: Path, **keys: Any) -> Report:
        return quantize(plan(make_recipe(model, output, **keys), device="cpu"), _silent)

    return run


def _silent(at: int, total: int, text: str) -> None:
    pass
