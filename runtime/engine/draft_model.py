"""Drafts of a smaller model: mostly a 4-bit artifact of the very model that checks them.

It drafts one token more as long as that promises more than its time gives otherwise. How likely the
token is right follows from how sure the model was of those before it, and from how often it was
right when it was as sure. Nothing is timed: what a step takes follows from the bytes that both
models read, so the same seed gives the same text again.
"""

from bisect import bisect
from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.engine.drafts import GAIN, MOST, Odds
from optim.runtime.engine.load import Model
from optim.runtime.engine.sampling import Guess, Sampler

SURE = (0.3, 0.5, 0.7, 0.85, 0.95)
RIGHT = (0.5, 0.65, 0.8, 0.9, 0.95, 0.98)
"""The chance of a token that was drafted with one below the first of SURE, between the first two,
and so on; before any was tried."""
USUAL = 0.8  # the same of all together
RATE, STEPS = 1.3, 10.0  # tokens in the time of a plain step: a first guess, worth so many steps
LASTING = 0.98  # what was gained before a step counts less after it
VERIFIED = 0.08  # what a token more adds to a step of the model that checks


class ModelDrafts:
    """Drafts of `model` for `target`; they stay when a text ends, and serve the next one."""

    def __init__(self, model: Model, target: Model, context: int) -> None:
        """Texts longer than `context`, or than `model` has room for, go on without drafts.

        Raises OptimError (2) where the two do not go together, or drafts would gain nothing.
        """
        check(model, target)
        self.drafted = self.accepted = 0
        self._model, self._usual = model, Odds(USUAL)
        self._odds = [Odds(chance) for chance in RIGHT]
        self._sure: list[int] = []  # of the last drafts, places in _odds
        self._tokens, self._time = RATE * STEPS, STEPS  # in plain steps
        self._cache = model.new_cache(length=min(context, model.max_context))
        self._each = VERIFIED + model.weight_bytes / target.weight_bytes
        self._held: list[int] = []  # what the cache holds
        self._read = 0  # tokens of the last history

    def propose(self, history: Sequence[int], most: int, sampler: Sampler) -> list[Guess]:
        """See Drafts. Drawn as `sampler` draws."""
        most = min(most, MOST, self._cache.limit - len(history) + 1)
        needed = self._each * max(self._tokens / self._time, GAIN)
        usual, alive = self._usual.fade(), 1.0  # the chance that all so far are right
        guesses: list[Guess] = []
        text, self._sure = list(history), []
        while len(guesses) < most and alive * usual > needed:
            logits = self._after(text)
            guess = sampler.guess(logits, text)
            guesses.append(guess)
            text.append(guess.token)
            self._sure.append(bisect(SURE, _chance(guess, logits)))
            alive *= self._odds[self._sure[-1]].fade()
        self._read = len(history)
        return guesses

    def learn(self, drafted: int, accepted: int, seconds: float) -> None:
        """See Drafts."""
        self.drafted += drafted
        self.accepted += accepted
        self._tokens = self._tokens * LASTING + accepted + 1
        self._time = self._time * LASTING + 1 + self._each * drafted
        if not drafted:
            return
        self._usual.learn(drafted, accepted)
        for place, sure in enumerate(self._sure[: min(accepted + 1, drafted)]):
            self._odds[sure].learn(1, int(place < accepted))

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


def _chance(guess: Guess, logits: Tensor) -> float:
    """What `logits` `[V]`, or the chances made of them, gave the token."""
    if guess.chances is None:
        return float(torch.softmax(logits, -1)[guess.token])
    return guess.chances.share(guess.token)


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
