"""Generation: prompt in, tokens out; and a conversation that keeps its cache between turns."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.cache.full import Cache, Policy
from optim.runtime.cache.saved import Stored, load_cache, save_cache
from optim.runtime.engine.drafts import Lookup, lookup
from optim.runtime.engine.load import Model
from optim.runtime.engine.repeats import repeats
from optim.runtime.engine.sampling import Sampler, Sampling
from optim.runtime.engine.stop_text import StopText
from optim.runtime.storage.size_table import stored

Message = dict[str, str]
Reading = Callable[[int, int], None]
"""Told, while a prompt is read, how many of its tokens are done and how many there are."""
LOOK = 32  # tokens between two looks for a loop


def generate(
    model: Model,
    ids: Sequence[int],
    sampling: Sampling,
    cache: Cache | None = None,
    stop_ids: AbstractSet[int] | None = None,
    reading: Reading | None = None,
    drafts: Lookup | None = None,
) -> Generator[int, None, str]:
    """Yield the tokens that follow `ids`; the return value says why it ended.

    `cache` may hold the first of `ids` already. `stop_ids` (default: the model's end tokens) end
    the text and are not part of it: "stop". The others are "length" and "context". `reading` is
    called before each chunk of the prompt, and may raise to stop there. `drafts` may guess tokens
    ahead: the text is the same with any and with none.
    Raises OptimError (2) if `ids` do not fit the context.
    """
    cache = cache or model.new_cache()
    stop_ids = model.tokenizer.eos_ids if stop_ids is None else stop_ids
    sample = Sampler(sampling, model.device, len(ids))
    history = list(ids)
    if reading is not None:
        cache.reading = lambda done: reading(done, len(ids))
    try:
        step = _Rows([], model.forward(torch.tensor([history[cache.length :]]), cache))
    finally:
        cache.reading = None
    while True:
        held, right = len(history), 0
        try:
            for row, guess in zip(step.logits, [*step.guesses, None], strict=True):
                held = len(history)
                token = sample(row, history)
                if token in stop_ids:
                    return "stop"
                right += token == guess
                history.append(token)
                yield token
                if len(history) - len(ids) == sampling.max_tokens:
                    return "length"
                if held == cache.limit:
                    return "context"
                if token != guess:
                    break
        finally:
            if step.guesses:
                cache.truncate(held)  # the wrong ones
            if drafts is not None:
                drafts.learn(len(step.guesses), right, step.seconds)
        left = (sampling.max_tokens or cache.limit) - (len(history) - len(ids))
        step = _step(model, cache, history, drafts, min(left - 1, cache.limit - len(history)))


@dataclass(slots=True)
class _Rows:
    """Logits after a text's last token and after each of some guesses, and what they took."""

    guesses: list[int]
    logits: Iterable[torch.Tensor]
    seconds: float = 0.0


def _step(
    model: Model, cache: Cache, history: list[int], drafts: Lookup | None, most: int
) -> _Rows:
    """The step after `history`, whose last token the cache lacks, with at most `most` guesses."""
    guesses = drafts.propose(history, most) if drafts is not None and most > 0 else []
    if guesses:
        guesses = guesses[: model.undoable(cache, 1 + len(guesses)) - 1]
    start = perf_counter()
    if guesses:
        logits = model.step_many([(cache, [history[-1], *guesses])])[0]
    else:
        logits = model.forward(torch.tensor([history[cache.length :]]), cache)
    return _Rows(guesses, logits, perf_counter() - start)


@dataclass(slots=True)
class Stats:
    """What the last reply cost. `cached_tokens` of the prompt were in the cache already."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    stop_reason: str = ""
    repeats: bool = False
    """The reply goes round in circles."""
    drafted_tokens: int = 0
    """Tokens that were guessed ahead; `accepted_tokens` of them stand in the reply."""
    accepted_tokens: int = 0

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the first, which the prefill gives."""
        steps = self.new_tokens - 1
        return steps / self.decode_seconds if steps > 0 and self.decode_seconds else 0.0


class Session:
    """A conversation. `messages`, `system` and `sampling` may be changed between replies.

    The cache is kept, and as much of it as the next prompt shares is used again. A reply may be
    closed or interrupted at any point; what came until then is its message.
    """

    def __init__(
        self,
        model: Model,
        *,
        system: str = "",
        sampling: Sampling | None = None,
        context: int | None = None,
        policy: Policy | None = None,
        speculate: str = "auto",
    ) -> None:
        """`speculate`: "auto" guesses tokens ahead where that pays, "lookup" wherever it can.

        Raises OptimError (2) for another word than those and "off", and as `Model.context` does.
        """
        self.model = model
        lookup(speculate)
        self.speculate = speculate
        self.system = system
        self.sampling = sampling or Sampling()
        self.messages: list[Message] = []
        self.stats = Stats()
        self._limits = model.context(context), policy
        self._cache = self._empty_cache()
        self._tokens: list[int] = []  # what the cache holds, and perhaps one more

    def reply(self, text: str, reading: Reading | None = None) -> Generator[str, None, None]:
        """Say `text`; yields the reply in pieces. Both become part of `messages`.

        Raises OptimError (2), and changes nothing, if the conversation no longer fits. Nor does it
        change `messages` to be interrupted before the first token, by `reading` or otherwise.
        """
        before = self.messages
        asked = [*before, {"role": "user", "content": text}]
        system = [{"role": "system", "content": self.system}] if self.system else []
        ids = self._fitting(self.model.tokenizer.chat([*system, *asked]))
        self.messages = asked
        said: list[str] = []
        try:
            for piece in self._stream(ids, reading):
                said.append(piece)
                yield piece
        finally:
            heard = self.stats.new_tokens or self.stats.stop_reason != "interrupted"
            reply = {"role": "assistant", "content": "".join(said)}
            self.messages = [*asked, reply] if heard else before

    def complete(self, text: str, reading: Reading | None = None) -> Generator[str, None, None]:
        """Continue `text` as it is, without a chat template; yields pieces.

        They are just what the tokens stand for: a character that is cut ends them as U+FFFD.
        """
        ids = self._fitting(self.model.tokenizer.encode(text, special=True))
        return self._stream(ids, reading, exact=True)

    @property
    def limit(self) -> int:
        """So many tokens the conversation may have."""
        return self._cache.limit

    def info(self) -> dict[str, str]:
        """Facts to show about the model and the conversation."""
        model, cache = self.model, self._cache
        tensors = stored(model.checkpoint)
        params, nbytes = sum(t.params for t in tensors), sum(t.nbytes for t in tensors)
        return {
            "model": model.checkpoint.source,
            "parameters": f"{params:,} of {8 * nbytes / max(params, 1):.2f} bits",
            "weights": f"{model.weight_bytes / 1e6:.0f} MB a token",
            "device": model.place,
            "context": cache.summary,
            "cache": f"{cache.nbytes / 1e6:.0f} MB",
        }

    def save_cache(self, path: Path) -> int:
        """Write what the conversation's cache holds to `path`; returns its bytes.

        0, and no file, if it holds nothing or is one of transformers' own. Raises OptimError (2)
        if the file cannot be written.
        """
        if not self._cache.length or not isinstance(self._cache, Stored):
            return 0
        return save_cache(path, self._cache, self._tokens, self.model.checkpoint.fingerprint())

    def load_cache(self, path: Path) -> str:
        """Go on from the cache in `path`; "", or why it cannot be used and all is read again."""
        with torch.inference_mode():
            fresh, self._tokens = self._empty_cache(), []
            self._cache = fresh
            if not isinstance(fresh, Stored):
                return "this family's cache is not saved"
            if getattr(self.model.decoder, "crossing", None) is not None:
                return "a longer text of this model has other keys"
            self._tokens, why = load_cache(path, fresh, self.model.checkpoint.fingerprint())
        return why

    def _empty_cache(self) -> Cache:
        length, policy = self._limits
        return self.model.new_cache(length=length, policy=policy)

    def _fitting(self, ids: list[int]) -> list[int]:
        limit = self._cache.limit
        if not ids:
            raise OptimError("the prompt is empty", "give it some text", USAGE)
        if len(ids) > limit:
            fix = self.model.more_room(limit) + (
                ", or /clear the conversation" * bool(self.messages)
            )
            what = f"the prompt is {len(ids)} tokens, the context {limit}"
            raise OptimError(what, fix, USAGE)
        return ids

    def _stream(
        self, ids: list[int], reading: Reading | None, exact: bool = False
    ) -> Generator[str, None, None]:
        """Generate after `ids`, up to a stop text; the end may be half a character if `exact`."""
        cached = self._reuse(ids)
        self.stats = Stats(prompt_tokens=len(ids), cached_tokens=cached, stop_reason="interrupted")
        self._tokens = list(ids)
        text, stops = self.model.tokenizer.stream(), StopText(self.sampling.stop)
        drafts = lookup(self.speculate)
        tokens = generate(
            self.model, ids, self.sampling, self._cache, reading=reading, drafts=drafts
        )
        with self._counting(drafts), closing(tokens):
            while (token := self._next(tokens)) is not None:
                if piece := stops.push(text.push(token)):
                    yield piece
                if stops.found:
                    self.stats.stop_reason = "stop"
                    return
        left = text.flush(cut=self.stats.stop_reason != "stop" and not exact)
        if piece := stops.push(left) + stops.flush():
            yield piece

    @contextmanager
    def _counting(self, drafts: Lookup | None) -> Iterator[None]:
        try:
            yield
        finally:
            if drafts is not None:
                self.stats.drafted_tokens = drafts.drafted
                self.stats.accepted_tokens = drafts.accepted

    def _reuse(self, ids: list[int]) -> int:
        """Cut the cache back to what it shares with `ids`, at least one of which is left to run."""
        held = self._tokens[: self._cache.length]
        pairs = zip(held, ids[:-1], strict=False)
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(held), len(ids) - 1))
        self._cache.truncate(shared)
        return self._cache.length

    def _next(self, tokens: Generator[int, None, str]) -> int | None:
        """The next token, timed and counted; None at the end."""
        start = perf_counter()
        try:
            token = next(tokens)
        except StopIteration as end:
            self.stats.stop_reason = end.value
            return None
        seconds = perf_counter() - start
        if self.stats.new_tokens:
            self.stats.decode_seconds += seconds
        else:
            self.stats.prefill_seconds = seconds
        self.stats.new_tokens += 1
        self._tokens.append(token)
        stats = self.stats
        if not stats.repeats and stats.new_tokens % LOOK == 0:
            stats.repeats = repeats(self._tokens[stats.prompt_tokens :])
        return token
