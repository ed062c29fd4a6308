"""From logits to the next token: temperature, top-k, top-p, min-p, repetition penalty.

The order is penalty, temperature, top-k, top-p (arXiv 1904.09751), min-p (arXiv 2407.01082); the
penalty is CTRL's (arXiv 1909.05858). Temperature 0 takes the likeliest token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How replies are drawn and where they end. OptimError (2) for a value that makes no sense."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int = 512
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", tuple(self.stop))
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 is greedy")
        _check("top_k", self.top_k, self.top_k >= 0, "0 is off")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "1 is off")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "0 is off")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, 0 < penalty < math.inf, "1 is off")
        _check("max_tokens", self.max_tokens, self.max_tokens >= 1, "give at least 1")
        seed = self.seed or 0
        _check("seed", seed, -(2**63) <= seed < 2**63, "give one from 0 to 2**63 - 1")
        _check("stop", self.stop, all(self.stop), "a stop text has at least one character")


def _check(name: str, value: object, good: bool, fix: str) -> None:
    if not good:
        raise OptimError(f"{name} cannot be {value}", fix, USAGE)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits `[V]` of the ids in `seen` by `penalty`."""
    old = logits[seen]
    return logits.index_put((seen,), torch.where(old > 0, old / penalty, old * penalty))


def distribution(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Chances of the candidates and their ids; ids None: candidate i is id i.

    `logits` `[V]` fp32, penalty applied; temperature above 0.
    """
    ids = None
    if sampling.top_k:
        logits, ids = logits.topk(min(sampling.top_k, logits.numel()))
    elif sampling.top_p < 1:
        logits, ids = logits.sort(descending=True)
    chances = torch.softmax(logits / sampling.temperature, -1)
    if sampling.top_p < 1:
        before = chances.cumsum(-1) - chances
        chances = chances.masked_fill(before >= sampling.top_p, 0)
        chances = chances / chances.sum()
    if sampling.min_p:
        chances = chances.masked_fill(chances < sampling.min_p * chances.max(), 0)
        chances = chances / chances.sum()
    return chances, ids


class Sampler:
    """Draws tokens for one reply; the same seed draws the same."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self._sampling = sampling
        self._random = torch.Generator(device)
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)

    def __call__(self, logits: Tensor, history: Sequence[int]) -> int:
        """The next id after `history`, from `logits` `[V]`."""
        s = self._sampling
        if s.repetition_penalty != 1 and history:
            seen = torch.tensor(sorted(set(history)), device=logits.device)
            logits = penalize(logits, seen, s.repetition_penalty)
        if s.temperature == 0:
            return int(logits.argmax())
        chances, ids = distribution(logits, s)
        drawn = torch.multinomial(chances, 1, generator=self._random)
        return int(drawn if ids is None else ids[drawn])
