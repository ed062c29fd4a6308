"""One text while it is written: what was asked, what has come, and why it ended."""

import time
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.engine.drafts import Drafts
from optim.runtime.engine.load import Model
from optim.runtime.engine.sampling import Bias, Guess, Sampler, Sampling
from optim.runtime.engine.stop_text import StopText
from optim.runtime.text.tokenizer import Stream


class Grammar(Protocol):
    """What may be written next; a grammar belongs to one text."""

    def mask(self, logits: Tensor) -> Tensor:
        """`logits` `[V]` with minus infinity where a token would break the grammar."""

    def take(self, token: int) -> None:
        """`token` has been written."""

    @property
    def done(self) -> bool:
        """Whether nothing more may be written."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt as ids, and how to answer it."""

    ids: list[int]
    sampling: Sampling
    exact: bool = False
    """The answer may end inside a character, as U+FFFD: text that is continued, not a reply."""
    logprobs: int | None = None
    """How many of the likeliest tokens to report beside each one written; None: no chances."""
    bias: Bias = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """The text, its number of tokens, and why it ended: "stop", "length" or "context"."""

    text: str
    tokens: int
    stop_reason: str


@dataclass(frozen=True, slots=True)
class Token:
    """A token that was written; chances are natural logarithms, before temperature and filters."""

    id: int
    chance: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Event:
    """What a step gave one text: a token (None: no new one), the text it completes, the end."""

    sequence: "Sequence"
    token: Token | None = None
    piece: str = ""
    reason: str = ""
    """"stop", "length", "context", "cancelled", "late", "memory", "error"; "" while it goes on."""


def check(request: Request, model: Model, context: int) -> None:
    """Raise OptimError (2) for a prompt that is empty or longer than `context`."""
    if not request.ids:
        raise OptimError("the prompt is empty", "give it some text", USAGE)
    if len(request.ids) > context:
        what = f"the prompt is {len(request.ids)} tokens, the context {context}"
        raise OptimError(what, model.more_room(context), USAGE)


@dataclass(slots=True, eq=False)
class Sequence:
    """A request under way. Another thread may set `cancelled` and `paused`, and nothing else.

    Raises OptimError (2) where `check` does.
    """

    model: Model = field(repr=False)
    request: Request
    context: int
    grammar: Grammar | None = None
    drafts: Drafts | None = None
    """Guesses tokens ahead while the text is written alone."""
    deadline: float = float("inf")
    """On the monotonic clock: a text that has not begun by then ends as "late"."""
    cancelled: bool = False
    paused: bool = False
    """Its reader is slow: it keeps its place, and no token is computed."""
    reason: str = ""
    cached: int = 0
    """So many tokens of the prompt another text had left behind."""
    begun: float = 0.0
    """When its prompt began to be read."""
    history: list[int] = field(init=False)
    _sample: Sampler = field(init=False, repr=False)
    _letters: Stream = field(init=False, repr=False)
    _stops: StopText = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check(self.request, self.model, self.context)
        sampling, tokenizer = self.request.sampling, self.model.tokenizer
        self.history = list(self.request.ids)
        self._sample = Sampler(sampling, self.model.device, len(self.history), self.request.bias)
        self._letters, self._stops = tokenizer.stream(), StopText(sampling.stop)

    @property
    def count(self) -> int:
        """Tokens written so far."""
        return len(self.history) - len(self.request.ids)

    @property
    def room(self) -> int:
        """Tokens that fit: the last one needs no place in the cache."""
        return self.context - len(self.request.ids) + 1

    @property
    def left(self) -> int:
        """Tokens that may still be written."""
        return min(self.request.sampling.max_tokens or self.room, self.room) - self.count

    @property
    def most(self) -> int:
        """Tokens of the context that prompt and answer take at most."""
        return min(
            self.context, len(self.request.ids) + (self.request.sampling.max_tokens or 1 << 40)
        )

    @property
    def best(self) -> int:
        """So many of the largest logits decide which token comes next; 0: all of them."""
        others = self.grammar or self.request.bias or self.request.logprobs is not None
        return 0 if others else self.request.sampling.best

    def late(self) -> bool:
        """Whether it has waited too long."""
        return time.monotonic() > self.deadline

    def guesses(self) -> list[Guess]:
        """Tokens that may come next, fewer than may still be written."""
        assert self.drafts is not None
        return self.drafts.propose(self.history, self.left - 1, self._sample)

    def take(self, logits: Tensor, guess: Guess | None = None) -> Event:
        """Draw the next token from `logits` `[V]`, or keep the `guess`.

        OptimError (2) if they are not finite.
        """
        raw = logits
        if self.grammar is not None:
            logits = self.grammar.mask(logits)
        id = self._sample(logits, self.history, guess)
        if id in self.model.tokenizer.eos_ids:
            return self.end("stop")
        self.history.append(id)
        if self.grammar is not None:
            self.grammar.take(id)
        token = self._token(id, raw)
        piece = self._stops.push(self._letters.push(id))
        if self._stops.found:
            self.reason = "stop"
            return Event(self, token, piece, "stop")
        if self.grammar is not None and self.grammar.done:
            return self.end("stop", token, piece)
        if self.count == self.request.sampling.max_tokens:
            return self.end("length", token, piece)
        if self.count == self.room:
            return self.end("context", token, piece)
        return Event(self, token, piece)

    def end(self, reason: str, token: Token | None = None, piece: str = "") -> Event:
        """The last event, with the text that was held back."""
        self.reason = reason
        left = self._letters.flush(cut=reason != "stop" and not self.request.exact)
        return Event(self, token, piece + self._stops.push(left) + self._stops.flush(), reason)

    def _token(self, id: int, logits: Tensor) -> Token:
        most = self.request.logprobs
        if most is None:
            return Token(id)
        chances = torch.log_softmax(logits.float(), -1)
        top = chances.topk(min(most, chances.numel()))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return Token(id, float(chances[id]), tuple(pairs))
