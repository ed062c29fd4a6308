"""From logits to the next token: temperature, top-k, top-p, min-p, repetition penalty.

The order is penalty, temperature, top-k, top-p (arXiv 1904.09751), min-p (arXiv 2407.01082); the
penalty is CTRL's (arXiv 1909.05858). Temperature 0 takes the likeliest token.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.storage.gate import OVERFLOWN
from optim.runtime.system.files import load_json

USUAL: dict[str, Any] = {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
"""For a model whose makers say nothing: what other local runners take, a little cooler."""
UNSAID: dict[str, Any] = {"temperature": 1.0, "top_k": 50}
"""What transformers takes for a value that a generation_config.json leaves out."""
Array = npt.NDArray[Any]
Bias = tuple[tuple[int, float], ...]
"""Ids, and what is added to their logits."""
DRAWN = ("temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How replies are drawn and where they end. OptimError (2) for a value that makes no sense."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    """None: as many as fit the context."""
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    """Taken from the logit of every token that the answer has already."""
    frequency_penalty: float = 0.0
    """The same, once for each time that it has it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", tuple(self.stop))
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 is greedy")
        _check("top_k", self.top_k, self.top_k >= 0, "0 is off")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "1 is off")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "0 is off")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, 0 < penalty < math.inf, "1 is off")
        most = self.max_tokens
        _check("max_tokens", most, most is None or most >= 1, "give at least 1")
        seed = self.seed or 0
        _check("seed", seed, -(2**63) <= seed < 2**63, "give one from 0 to 2**63 - 1")
        _check("stop", self.stop, all(self.stop), "a stop text has at least one character")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), abs(getattr(self, name)) <= 2, "give one in -2..2")

    @property
    def best(self) -> int:
        """So many of the largest logits decide which token is drawn; 0: all of them."""
        changed = self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty
        return 0 if changed else self.top_k if self.temperature else 1

    @property
    def summary(self) -> str:
        """In a few words: `greedy`, or `temperature 0.7, top_k 40`."""
        off = Sampling()
        kept = [*DRAWN, "repetition_penalty"] if self.temperature else ["repetition_penalty"]
        said = [f"{k} {getattr(self, k):g}" for k in kept if getattr(self, k) != getattr(off, k)]
        return ", ".join(said if self.temperature else ["greedy", *said])


def own_sampling(folder: Path) -> dict[str, Any]:
    """The values of `Sampling` that the makers of the model in `folder` advise; {} if none.

    They stand in generation_config.json, read as transformers reads it: `do_sample` false is
    greedy; of a model that is to be drawn, what is not said is temperature 1 and top_k 50.
    Raises OptimError (2) for a value that makes no sense.
    """
    path = folder / "generation_config.json"
    said = load_json(path) if path.is_file() else {}
    found = {k: said[k] for k in (*DRAWN, "repetition_penalty") if said.get(k) is not None}
    fix = f"correct {path}, or remove it"
    for key, value in found.items():
        if type(value) not in (int, float) or (key == "top_k" and type(value) is not int):
            raise OptimError(f"{path}: {key} cannot be {value!r}", fix, USAGE)
    if said.get("do_sample") is False:
        found = {**found, "temperature": 0.0}
    elif said.get("do_sample") or any(key in found for key in DRAWN):
        found = UNSAID | found
    try:
        Sampling(**found)
    except OptimError as error:
        raise OptimError(f"{path}: {error.message}", fix, USAGE) from None
    return found


def default_sampling(folder: Path) -> dict[str, Any]:
    """How replies of the model in `folder` are drawn where nothing else is asked: as its makers
    advise, or as is usual. Raises OptimError (2) as `own_sampling` does."""
    own = own_sampling(folder)
    return own if "temperature" in own else USUAL | own


def _check(name: str, value: object, good: bool, fix: str) -> None:
    if not good:
        raise OptimError(f"{name} cannot be {value}", fix, USAGE)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits `[V]` of the ids in `seen` by `penalty`."""
    old = logits[seen]
    return logits.index_put((seen,), torch.where(old > 0, old / penalty, old * penalty))


@dataclass(frozen=True, slots=True)
class Chances:
    """`chances` `[N]`, whatever their sum, of the `ids` `[N]`; None: id i is the i-th."""

    chances: Array
    ids: Array | None = None

    def spread(self, size: int) -> Array:
        """The chances of all `size` ids, 1 in all."""
        whole = np.zeros(size)
        whole[slice(None) if self.ids is None else self.ids] = self.chances
        whole /= whole.sum()
        return whole

    def share(self, id: int) -> float:
        """The chance of one of them, of 1 in all."""
        own = self.chances[id] if self.ids is None else self.chances[self.ids == id].sum()
        return float(own / self.chances.sum())


def distribution(logits: Array, sampling: Sampling) -> Chances:
    """What `sampling` leaves of `logits` `[V]` fp32, penalty applied; temperature above 0.

    On the CPU, whatever the model is on: selecting from a vocabulary takes numpy there a tenth of
    torch's time.
    """
    ids = likeliest(logits, sampling.top_k) if sampling.top_k else None
    if ids is not None:
        logits = logits[ids]
    chances: Array = torch.softmax(torch.from_numpy(logits) / sampling.temperature, -1).numpy()
    least = _least(chances, sampling.top_p) if sampling.top_p < 1 else 0.0
    least = max(least, sampling.min_p * float(chances.max()))
    if not least:
        return Chances(chances, ids)
    kept = np.flatnonzero(chances >= least)
    return Chances(chances[kept], kept if ids is None else ids[kept])


BLOCK = 64


def likeliest(logits: Array, count: int) -> Array:
    """The places of the `count` largest of `logits` `[V]`, largest first, without minus infinity.

    The `count` largest of the maxima of blocks are among the logits, so no smaller one is needed.
    """
    blocks = logits[: logits.size // BLOCK * BLOCK].reshape(-1, BLOCK).max(1)
    enough = np.partition(blocks, -count)[-count] if len(blocks) >= count else -np.inf
    places = np.flatnonzero(logits >= max(enough, np.finfo(logits.dtype).min))
    return places[np.argsort(-logits[places], kind="stable")[:count]]


def _least(chances: Array, share: float) -> float:
    """The smallest of the likeliest `chances` `[V]` that reach `share` together.

    What is rarer than `(1 - share) / V` cannot be among them, since all of it is less than
    `1 - share`: little is left to sort.
    """
    some = chances[np.flatnonzero(chances >= (1 - share) / chances.size)]
    falling = -np.sort(-some)
    last = min(int(np.searchsorted(_sums(falling), share)), falling.size - 1)
    return float(falling[last])


def _sums(chances: Array) -> Array:
    """Running sums, in float64."""
    sums: Array = torch.from_numpy(chances).cumsum(-1, dtype=torch.float64).numpy()
    return sums


@dataclass(frozen=True, slots=True)
class Guess:
    """A token that may come next, and the chances by which it was drawn; None: by no chance."""

    token: int
    chances: Chances | None = None


def require_finite(logits: Tensor | Array) -> None:
    """OptimError (2) for logits with NaN, or without a largest one."""
    if not math.isfinite(logits.max()):
        raise OptimError("what the model computes is not a finite number", OVERFLOWN, USAGE)


class Sampler:
    """Draws tokens for one reply; the same seed draws the same."""

    def __init__(
        self, sampling: Sampling, device: torch.device, prompt: int = 0, bias: Bias = ()
    ) -> None:
        """`prompt` tokens of a history are not the answer's; `bias` is added to logits."""
        self._sampling, self._prompt, self._bias = sampling, prompt, bias
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)

    def __call__(self, logits: Tensor, history: Sequence[int], guess: Guess | None = None) -> int:
        """The next id after `history`, from `logits` `[V]`. OptimError (2) for NaN or infinity.

        As often as these logits say, whatever was guessed. A guess that was drawn by chances of its
        own is taken as often as both allow, and what is missing then is drawn from what these
        logits have more of (arXiv 2211.17192).
        """
        found = self._chances(logits, history)
        if isinstance(found, int):
            return found
        if guess is None or guess.chances is None:
            return self._draw(found)
        size = logits.numel()
        wanted, had = found.spread(size), guess.chances.spread(size)
        if self._point() * had[guess.token] < wanted[guess.token]:
            return guess.token
        more = np.maximum(wanted - had, 0)
        return self._draw(Chances(more) if more.any() else found)

    def guess(self, logits: Tensor, history: Sequence[int]) -> Guess:
        """The same of another model's logits: a token, and what has to be known to check it."""
        found = self._chances(logits, history)
        return Guess(found) if isinstance(found, int) else Guess(self._draw(found), found)

    def _chances(self, logits: Tensor, history: Sequence[int]) -> Chances | int:
        """What may come next, or the one token that does."""
        s = self._sampling
        if s.repetition_penalty != 1 and history:
            seen = torch.tensor(sorted(set(history)), device=logits.device)
            logits = penalize(logits, seen, s.repetition_penalty)
        if s.presence_penalty or s.frequency_penalty or self._bias:
            logits = self._shifted(logits, history[self._prompt :])
        values = logits.float().cpu().numpy()  # its maximum takes numpy a quarter of torch's time
        require_finite(values)
        return distribution(values, s) if s.temperature else int(values.argmax())

    def _point(self) -> float:
        """A number below 1 and not below 0."""
        return float(torch.rand(1, generator=self._random, dtype=torch.float64))

    def _draw(self, of: Chances) -> int:
        """One of them, as often as they say.

        The first whose running sum passes a point below the whole: never one without a chance.
        """
        sums = _sums(of.chances)
        place = int(np.searchsorted(sums, self._point() * sums[-1], side="right"))
        return place if of.ids is None else int(of.ids[place])

    def _shifted(self, logits: Tensor, answer: Sequence[int]) -> Tensor:
        """`logits` `[V]` with what the sampling adds to some, and takes from those of `answer`."""
        s, shift = self._sampling, dict(self._bias)
        for token, count in Counter(answer).items():
            shift[token] = shift.get(token, 0.0) - s.presence_penalty - s.frequency_penalty * count
        ids = torch.tensor(list(shift), dtype=torch.int64, device=logits.device)
        values = torch.tensor(list(shift.values()), dtype=logits.dtype, device=logits.device)
        return logits.index_add(0, ids, values)
