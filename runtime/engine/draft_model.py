"""Drafts of a smaller model: mostly a 4-bit artifact of the very model that checks them.

How many it drafts depends on the text alone, on how many were right so far and on the bytes that
both models read: the same seed gives the same text again.
"""

from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.engine.drafts import MOST, Odds, worth
from optim.runtime.engine.load import Model
from optim.runtime.engine.sampling import Guess, Sampler

RIGHT = 0.8  # the chance of a token, before any was tried
VERIFIED = 0.08  # what a token more adds to a step of the model that checks


class ModelDrafts:
    """Drafts of `model` for `target`; they stay when a text ends, and serve the next one."""

    def __init__(self, model: Model, target: Model, context: int) -> None:
        """Texts longer than `context`, or than `model` has room for, go on without drafts.

        Raises OptimError (2) where the two do not go together, or drafts would gain nothing.
        """
        check(model, target)
        self.drafted = self.accepted = 0
        self._model, self._odds = model, Odds(RIGHT)
        self._cache = model.new_cache(length=min(context, model.max_context))
        self._each = VERIFIED + model.weight_bytes / target.weight_bytes
        self._held: list[int] = []  # what the cache holds
        self._read = 0  # tokens of the last history

    def propose(self, history: Sequence[int], most: int, sampler: Sampler) -> list[Guess]:
        """See Drafts. Drawn as `sampler` draws."""
        room = self._cache.limit - len(history) + 1
        count = worth(self._odds.fade(), self._each, min(most, MOST, room))
        guesses: list[Guess] = []
        text = list(history)
        while len(guesses) < count:
            guesses.append(sampler.guess(self._after(text), text))
            text.append(guesses[-1].token)
        self._read = len(history)
        return guesses

    def learn(self, drafted: int, accepted: int, seconds: float) -> None:
        """See Drafts."""
        self.drafted += drafted
        self.accepted += accepted
        if drafted:
            self._odds.learn(drafted, accepted)

    def _after(self, text: list[int]) -> Tensor:
        """Logits `[V]` after `text`, of which the cache keeps what it holds already."""
        known = self._read if self._held[: self._read] == text[: self._read] else 0
        pairs = zip(self._held[known:], text[known:], strict=False)
        same = known + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        most = min(len(self._held), self._cache.length, len(text) - 1)
        self._cache.truncate(min(same, most))
        rest = text[self._cache.length :]
        logits = self._model.forward(torch.tensor([rest]), self._cache)
        self._held = text[:]
        return logits[0]


def check(model: Model, target: Model) -> None:
    """Raise OptimError (2), with the reason, unless `model` can draft for `target`."""
    name, other, fix = model.checkpoint.name, target.checkpoint.name, "leave --draft out"
    sizes = model.config["vocab_size"], target.config["vocab_size"]
    if model.tokenizer.vocabulary != target.tokenizer.vocabulary or sizes[0] != sizes[1]:
        why = f"{name} has other tokens than {other}: it cannot draft for it"
        fix = "give an artifact of the same model, or of a smaller one of its family"
    elif model.weight_bytes >= target.weight_bytes:
        why = f"{name} reads as much as {other} for a token: drafting gains nothing"
        fix = "give a smaller artifact, or leave --draft out"
    elif target.undoable(target.new_cache(), 2) < 2:
        why = f"{other} takes one token at a time here: checking drafts gains nothing"
    else:
        return
    raise OptimError(why, fix, USAGE)
