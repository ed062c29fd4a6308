"""Drafts: tokens that a text may go on with, all checked by the model in one step.

A draft that is right costs less than a step of its own; one that is wrong costs what the step took
longer. What is written is the same in every case: each token is drawn from the model's own chances,
as if there had been no draft. A guess of the look-up is kept where it is the very token that was
drawn; one of another model as `Sampler` says.

Prompt look-up (arXiv 2304.04487, and vLLM's and transformers' n-gram drafts): the text's last few
tokens stood before, and what followed them then may follow now.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.engine.sampling import Guess, Sampler

LONGEST, SHORTEST = 5, 2  # tokens that have to stood before
MOST = 7  # tokens of a draft
GAIN = 1.03  # a draft has to promise so much
KNOWN = 4.0  # tried tokens that a first guess is worth
FADING = 0.995  # what was seen before a draft counts less after it: a text changes
GUESS = {2: 0.35, 3: 0.45, 4: 0.6, 5: 0.7}
"""Length of a match: the chance that its next token is right, before any was tried."""
STEEPNESS = 0.25  # of the cost of a step, before any was timed: each token more, in steps of one
TIMED = 64  # steps with drafts, after which one goes without, to be timed
KINDS = ("auto", "lookup", "off")


class Drafts(Protocol):
    """Where the drafts of one text come from."""

    drafted: int
    accepted: int

    def propose(self, history: Sequence[int], most: int, sampler: Sampler) -> list[Guess]:
        """At most `most` tokens that may follow `history`, which has grown since the last call."""
        ...

    def learn(self, drafted: int, accepted: int, seconds: float) -> None:
        """What came of a step with `drafted` tokens, of which the first `accepted` were right."""
        ...


class Odds:
    """How often drafted tokens are right: a guess, then more and more what was seen."""

    def __init__(self, chance: float) -> None:
        self._first = chance
        self._tried, self._right = KNOWN, KNOWN * chance

    def fade(self) -> float:
        """The chance that a token is right; what was seen counts less from now on."""
        self._tried = KNOWN + (self._tried - KNOWN) * FADING
        self._right += (KNOWN * self._first - self._right) * (1 - FADING)
        return min(self._right / self._tried, 0.99)

    def learn(self, drafted: int, accepted: int) -> None:
        """As `Drafts.learn`; those after the first wrong one were not tried."""
        self._tried += min(accepted + 1, drafted)
        self._right += accepted


def worth(right: float, each: float, most: int) -> int:
    """The number of drafts that promises the most tokens a second; 0 where none pays.

    `right`: the chance of each; `each`: what one costs, in steps without any.
    """
    tokens, best, chosen = 1.0, GAIN, 0
    for k in range(1, most + 1):
        tokens += right**k
        if tokens / (1 + each * k) > best:
            best, chosen = tokens / (1 + each * k), k
    return chosen


@dataclass(slots=True)
class Lookup:
    """Drafts of one text. Unless `always`, only those that promise to pay, by what was measured."""

    always: bool = False
    drafted: int = 0
    accepted: int = 0
    _places: dict[tuple[int, ...], int] = field(default_factory=dict, repr=False)
    _read: int = 0
    _match: int = 0
    _odds: dict[int, Odds] = field(
        default_factory=lambda: {match: Odds(chance) for match, chance in GUESS.items()}
    )
    _one: float = 0.0
    """Seconds of a step of one token, a moving average; `_slope`: what a token more adds to it."""
    _slope: float = STEEPNESS
    _untimed: int = 0

    def propose(self, history: Sequence[int], most: int, sampler: Sampler) -> list[Guess]:
        """See Drafts."""
        for end in range(max(self._read, 1), len(history)):
            for n in range(SHORTEST, min(LONGEST, end) + 1):
                self._places[tuple(history[end - n : end])] = end
        self._read = len(history)
        for n in range(min(LONGEST, len(history)), SHORTEST - 1, -1):
            place = self._places.get(tuple(history[-n:]))
            if place is not None:
                self._match = n
                count = min(most, MOST) if self.always else self._worth(n, min(most, MOST))
                return [Guess(token) for token in history[place : place + count]]
        return []

    def _worth(self, match: int, most: int) -> int:
        if not self._one or self._untimed == TIMED:
            return 0
        return worth(self._odds[match].fade(), self._slope, most)

    def learn(self, drafted: int, accepted: int, seconds: float) -> None:
        """See Drafts."""
        self.drafted += drafted
        self.accepted += accepted
        if not drafted:
            usual = self._one or seconds
            self._one, self._untimed = usual + (min(seconds, 2 * usual) - usual) * 0.1, 0
            return
        self._untimed += 1
        self._odds[self._match].learn(drafted, accepted)
        if self._one:
            slope = (seconds / self._one - 1) / drafted
            self._slope += (min(max(slope, 0.0), 2.0) - self._slope) * 0.2


def lookup(kind: str) -> Lookup | None:
    """The drafts that a word asks for: see KINDS. OptimError (2) for any other word."""
    if kind not in KINDS:
        raise OptimError(f"no drafts are called {kind!r}", f"known: {', '.join(KINDS)}", USAGE)
    return None if kind == "off" else Lookup(always=kind == "lookup")
