"""A cache without an end: the first tokens and the latest ones (StreamingLLM, arXiv 2309.17453).

Softmax needs somewhere to put its weight, and models put it on the first tokens: kept as "sinks",
they hold the model together while the middle of the text is forgotten. Distances are counted in the
cache: the sinks follow right before the window. Rotary scores depend on distances alone, so
the window keeps its keys, and only the sinks' are turned on when something is forgotten.

What is forgotten is forgotten a quarter of the window at a time, so each token sees the sinks and
the latest three quarters of the window, or more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.cache.full import CHUNK, Layer, restored, states

SINKS = 4
SMALLEST = 16  # positions a cache must have

Turn = Callable[[Tensor, int], Tensor]
"""Turns keys `[rows, n, D]` on by so many positions."""


@dataclass(slots=True)
class StreamCache:
    """At most `capacity` positions of a text of any length.

    `length` tokens have been seen; `gone` of them, right after the sinks, are forgotten. `turns`
    has one function a layer; None: its keys know no position.
    """

    layers: Sequence[Layer]
    turns: Sequence[Turn | None]
    capacity: int
    length: int = 0
    gone: int = 0
    room: int = 0
    limit: int = 1 << 62
    padding: Tensor | None = None
    sinks: list[Tensor] = field(default_factory=list)  # their keys, before anything was forgotten
    places: object = field(default=None, repr=False)

    @property
    def step(self) -> int:
        return (self.capacity - SINKS) // 4

    @property
    def span(self) -> int:
        return self.capacity

    def place(self, count: int) -> int:
        """Make room for `count` (at most `step`) positions; where the first of them goes."""
        held = self.length - self.gone
        if held + count > self.capacity:
            self._forget(self.step)
            held = self.length - self.gone
        self._reserve(held + count)
        return held

    def place_run(self, count: int) -> tuple[int, int]:
        start = self.place(1)
        count = min(count, self.capacity - start)
        self._reserve(start + count)
        return start, min(count, self.layers[0].free(start))

    def _forget(self, count: int) -> None:
        """Drop `count` positions after the sinks; the rest moves down."""
        seen, gone, end = self.length, self.gone + count, self.length - self.gone
        sinks = self.sinks or [x.keys_at(0, SINKS).contiguous().clone() for x in self.layers]
        self.clear()  # whoever interrupts this finds an empty cache
        for layer, turn, keys in zip(self.layers, self.turns, sinks, strict=True):
            layer.drop(SINKS, count, end)
            if turn is not None:
                layer.put_keys(turn(keys, gone), 0)
        self.length, self.gone, self.sinks = seen, gone, sinks

    def clear(self) -> None:
        """Forget everything."""
        self.length = self.gone = 0
        self.sinks = []

    def _reserve(self, length: int) -> None:
        if length > self.room:
            wanted = max(length, self.room + self.room // 2)
            self.room = min(self.capacity, -(-wanted // CHUNK) * CHUNK)
            for layer in self.layers:
                layer.grow(self.room)

    def truncate(self, length: int) -> None:
        """Forget from token `length` on.

        Where so much of what comes before is gone already that less than half the cache would be
        left, forget everything: it has to be computed again.
        """
        if length >= self.length:
            return
        self.length = length
        if self.gone and length - self.gone < self.capacity // 2:
            self.clear()

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def summary(self) -> str:
        return f"{self.length - self.gone} of {self.capacity} tokens, {self.gone} forgotten"

    @property
    def identity(self) -> str:
        return f"stream of {self.capacity}, {self.layers[0].identity}"

    def state(self) -> dict[str, Tensor]:
        """All tensors, to be saved."""
        sinks = {f"sinks.{i:05}": keys.cpu() for i, keys in enumerate(self.sinks)}
        seen = torch.tensor([self.length, self.gone])
        return {"seen": seen} | sinks | states(self.layers, self.length - self.gone)

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`; ValueError, and an empty cache, if it is not of this form."""
        seen = _seen(state)
        sinks = [state[name] for name in sorted(state) if name.startswith("sinks.")]
        empty = [layer.keys_at(0, 0).shape for layer in self.layers] if seen[1] else []
        if [x.shape for x in sinks] != [(rows, SINKS, dim) for rows, _, dim in empty]:
            raise ValueError("the sinks have another shape")
        rest = {k: v for k, v in state.items() if k != "seen" and not k.startswith("sinks.")}
        self.room = restored(self.layers, rest, self.capacity)
        if seen[0] - seen[1] != self.room:
            raise ValueError(f"{seen[0]} tokens, {seen[1]} of them forgotten")
        self.length, self.gone, self.sinks = seen[0], seen[1], sinks


def _seen(state: dict[str, Tensor]) -> tuple[int, int]:
    """How many tokens a saved stream has seen, and how many of them are gone."""
    seen = state["seen"].tolist()
    if not isinstance(seen, list) or [type(n) for n in seen] != [int, int] or min(seen) < 0:
        raise ValueError("the counts are no counts")
    return seen[0], seen[1]


def stream_cache(
    layers: Sequence[Layer], turns: Sequence[Turn | None], capacity: int, batch: int
) -> StreamCache:
    """An empty cache of `capacity` positions. OptimError (2) if that is too few, or for a batch."""
    if capacity < SMALLEST:
        what = f"a streaming cache of {capacity} tokens is too small"
        raise OptimError(what, f"--context {SMALLEST} or more", USAGE)
    if batch != 1:
        raise OptimError("a streaming cache holds one text", "--kv-policy full", USAGE)
    return StreamCache(layers, turns, capacity)
