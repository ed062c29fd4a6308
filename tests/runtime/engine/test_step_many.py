"""Several texts in one step: each gets, in every bit, what it gets alone and a token at a time."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from optim.recipes.errors import OptimError
from optim.runtime.cache.full import Cache, Policy
from optim.runtime.engine.load import Model, load_model

MakeModel = Callable[..., Path]
PROMPTS = ([5, 6, 7, 8, 9, 10, 11], [12, 13], [14] * 30)
STEPS = ([[20, 21, 22], [23], [24, 25]], [[26], [27, 28, 29, 30]], [[31, 32], [33], [34]])
"""Tokens of each text, step by step; the second ends early."""


def begun(model: Model, prompt: list[int], policy: Policy | None = None) -> Cache:
    cache = model.new_cache(length=64, policy=policy)
    model.forward(torch.tensor([prompt]), cache)
    return cache


def alone(model: Model, text: int, policy: Policy | None = None) -> list[Tensor]:
    """The logits `[vocab]` of each token of a text, one forward a token."""
    cache = begun(model, PROMPTS[text], policy)
    tokens = [token for step in STEPS[text] for token in step]
    return [model.forward(torch.tensor([[token]]), cache)[0] for token in tokens]


def together(model: Model, policy: Policy | None = None) -> list[list[Tensor]]:
    caches = [begun(model, prompt, policy) for prompt in PROMPTS]
    found: list[list[Tensor]] = [[] for _ in PROMPTS]
    for at in range(3):
        rows = [i for i in range(len(PROMPTS)) if at < len(STEPS[i])]
        work = [(caches[i], STEPS[i][at]) for i in rows]
        for i, logits in zip(rows, model.step_many(work), strict=True):
            found[i] += logits
    return found


def test_every_family(family: str, make_model: MakeModel) -> None:
    model = load_model(str(make_model(family)), device="cpu")
    for text, found in enumerate(together(model)):
        torch.testing.assert_close(
            torch.stack(found), torch.stack(alone(model, text)), rtol=0, atol=0
        )


def test_what_does_not_fit_changes_nothing(make_model: MakeModel) -> None:
    model = load_model(str(make_model("llama")), device="cpu")
    first, second = begun(model, PROMPTS[0]), begun(model, list(range(62)))
    with pytest.raises(OptimError, match="65 tokens do not fit a context of 64"):
        model.step_many([(first, [1]), (second, [1, 2, 3])])
    assert (first.length, second.length) == (7, 62)
    assert model.step_many([]) == []
