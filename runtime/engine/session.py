"""A conversation that keeps its cache between turns."""

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.cache.full import Cache, Policy
from optim.runtime.cache.saved import Stored, load_cache, save_cache
from optim.runtime.engine.draft_model import ModelDrafts
from optim.runtime.engine.drafts import lookup
from optim.runtime.engine.load import Model
from optim.runtime.engine.repeats import repeats
from optim.runtime.engine.sampling import Sampling
from optim.runtime.engine.scheduler import write
from optim.runtime.engine.sequence import Event, Request, Sequence
from optim.runtime.engine.slots import Slots
from optim.runtime.storage.size_table import stored

Message = dict[str, str]
Reading = Callable[[int, int], None]
"""Told, while a prompt is read, how many of its tokens are done and how many there are."""
LOOK = 32  # tokens between two looks for a loop


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
        draft: Model | None = None,
    ) -> None:
        """`speculate`: "auto" guesses tokens ahead where that pays, "lookup" wherever it can;
        `draft`, a smaller artifact of `model`, guesses in their place.

        Raises OptimError (2) for another word than those and "off", for a `draft` that does not
        fit, and as `Model.context` does.
        """
        self.model = model
        lookup(speculate)
        self.speculate = speculate
        self.system = system
        self.sampling = sampling or Sampling()
        self.messages: list[Message] = []
        self.stats = Stats()
        self._slots = Slots(model, 1, model.context(context), policy=policy, alike=False)
        self._slot = self._slots.slots[0]
        self._smaller = None if draft is None else ModelDrafts(draft, model, self._slots.limit)

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
        return self._slots.limit

    @property
    def _cache(self) -> Cache:
        """What has been read and written; an empty one before that, or after a failure."""
        if self._slot.cache is None:
            self._slot.cache = self._slots.empty()
        return self._slot.cache

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
        return save_cache(path, self._cache, self._slot.ids, self.model.checkpoint.fingerprint())

    def load_cache(self, path: Path) -> str:
        """Go on from the cache in `path`; "", or why it cannot be used and all is read again."""
        with torch.inference_mode():
            self._slot.clear()
            fresh = self._cache
            if not isinstance(fresh, Stored):
                return "this family's cache is not saved"
            if getattr(self.model.decoder, "crossing", None) is not None:
                return "a longer text of this model has other keys"
            self._slot.ids, why = load_cache(path, fresh, self.model.checkpoint.fingerprint())
        return why

    def _fitting(self, ids: list[int]) -> list[int]:
        limit = self.limit
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
        """Write after `ids`, up to a stop text; the end may be half a character if `exact`."""
        drafts = self._smaller or lookup(self.speculate)
        before = (drafts.drafted, drafts.accepted) if drafts is not None else (0, 0)
        asked = Request(ids, self.sampling, exact)
        text = Sequence(self.model, asked, self.limit, drafts=drafts)
        self.stats = stats = Stats(prompt_tokens=len(ids), stop_reason="interrupted")
        with closing(write(text, self._slots)) as steps:
            while not text.reason:
                if reading is not None and not text.count:
                    reading(self._cache.length if text.begun else 0, len(ids))
                start = perf_counter()
                events = next(steps)
                self._time(perf_counter() - start)
                stats.cached_tokens = text.cached
                if drafts is not None:
                    stats.drafted_tokens = drafts.drafted - before[0]
                    stats.accepted_tokens = drafts.accepted - before[1]
                for event in events:
                    self._count(event)
                    if event.piece:
                        yield event.piece

    def _time(self, seconds: float) -> None:
        if self.stats.new_tokens:
            self.stats.decode_seconds += seconds
        else:
            self.stats.prefill_seconds += seconds

    def _count(self, event: Event) -> None:
        stats, text = self.stats, event.sequence
        stats.stop_reason = event.reason or stats.stop_reason
        stats.new_tokens += event.token is not None
        if not stats.repeats and stats.new_tokens % LOOK == 0:
            stats.repeats = repeats(text.history[stats.prompt_tokens :][: stats.new_tokens])
