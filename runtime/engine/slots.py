"""The places of texts that are written side by side: each has a cache, kept for the next text.

A new text takes over what an old one has read, if they begin alike. Where texts are to come out as
if they were alone, only whole pieces of a prompt are taken over: a prompt is always read in the
same pieces, so a text's numbers are, in every bit, those that it would have had alone.
"""

import time
from dataclasses import dataclass, field

from optim.runtime.cache.full import CHUNK, Cache, Policy, StaticCache
from optim.runtime.engine.load import Model
from optim.runtime.engine.sequence import Sequence


@dataclass(slots=True, eq=False)
class Slot:
    """A cache, the text that it holds, and whose text is in it now."""

    cache: Cache | None = None
    ids: list[int] = field(default_factory=list)
    """The text's tokens, perhaps more than the cache holds; the first `prompt` were its prompt."""
    prompt: int = 0
    owner: Sequence | None = None
    used: float = 0.0

    def clear(self) -> None:
        self.cache, self.ids, self.prompt, self.owner = None, [], 0, None


class Slots:
    """`count` slots, which hold at most `most_bytes` of keys and values together; one, if the model
    writes one text at a time.

    `alike`: a text comes out, in every bit, as if there had been none before it. Else it takes over
    all that it shares with one before, written tokens too.
    """

    def __init__(
        self,
        model: Model,
        count: int,
        context: int,
        most_bytes: int | None = None,
        policy: Policy | None = None,
        alike: bool = True,
    ) -> None:
        self.model, self.context, self.policy = model, context, policy
        self.slots = [Slot() for _ in range(1 if model.one_at_a_time else count)]
        self._alike, self._piece = alike, model.piece if alike else 1
        cache = self.empty()
        self.limit = cache.limit
        """So many tokens a text may have."""
        self.position_bytes = _position_bytes(cache)
        # What is older is kept at 4 bits, and a shorter text would have it at 8.
        whole = policy is None or (policy.bits != 4 and policy.kind == "full")
        exact = isinstance(cache, StaticCache) and whole and not model.one_at_a_time
        self._keeps = exact or not alike
        self.most_bytes = most_bytes or len(self.slots) * self._bytes(context)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held now."""
        return sum(slot.cache.nbytes for slot in self.slots if slot.cache is not None)

    @property
    def busy(self) -> int:
        return sum(slot.owner is not None for slot in self.slots)

    def empty(self) -> Cache:
        """A new cache."""
        return self.model.new_cache(length=self.context, policy=self.policy)

    def ever_fits(self, sequence: Sequence) -> bool:
        """Whether the text would fit if it were alone."""
        return self._bytes(sequence.most) <= self.most_bytes

    def place(self, sequence: Sequence) -> Slot | None:
        """A slot for a text, with as much of its prompt as is there; None if it has to wait."""
        ids, free = sequence.request.ids, [slot for slot in self.slots if slot.owner is None]
        slot = max(free, key=lambda slot: (self._shared(slot, ids), -slot.used), default=None)
        if slot is None or not self._room(sequence, slot):
            return None
        shared = self._shared(slot, ids)
        donor = max(self.slots, key=lambda slot: self._shared(slot, ids))
        if self._shared(donor, ids) > shared:
            shared = self._shared(donor, ids)
            slot.cache = self._copy(donor, shared)
        elif slot.cache is None or not shared:
            slot.cache = self.empty()
        slot.cache.truncate(shared)
        sequence.cached = slot.cache.length
        slot.ids, slot.prompt, slot.owner = sequence.history, len(ids), sequence
        return slot

    def release(self, slot: Slot, keep: bool = True) -> None:
        """Its text has ended; what its cache holds waits for the next one, if `keep`."""
        slot.owner, slot.used = None, time.monotonic()
        if not keep or not self._keeps:
            slot.clear()

    def forget(self) -> None:
        """Let go of what is kept of texts that have ended."""
        for slot in self.slots:
            if slot.owner is None:
                slot.clear()

    def _shared(self, slot: Slot, ids: list[int]) -> int:
        """So many tokens of `ids` need not be read again; at least one is left."""
        if slot.cache is None or not self._keeps:
            return 0
        most = min(slot.cache.length, len(ids) - 1)
        held = slot.ids[: min(most, slot.prompt) if self._alike else most]
        pairs = enumerate(zip(held, ids, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), len(held))
        return same // self._piece * self._piece

    def _room(self, sequence: Sequence, slot: Slot) -> bool:
        """Whether the text fits in `slot` beside those that are written; old ones make room."""
        taken = sum(self._bytes(s.owner.most) for s in self.slots if s.owner is not None)
        need = taken + self._bytes(sequence.most)
        if need > self.most_bytes:
            return False
        idle = [s for s in self.slots if s.owner is None and s is not slot and s.cache is not None]
        for old in sorted(idle, key=lambda slot: slot.used, reverse=True):
            need += old.cache.nbytes if old.cache is not None else 0
            if need > self.most_bytes:
                old.clear()
        return True

    def _bytes(self, positions: int) -> int:
        """At most so many for a text of `positions`: a cache grows by halves of itself."""
        most = min(self.context, -(-positions * 3 // 2 // CHUNK) * CHUNK)
        return most * self.position_bytes

    def _copy(self, donor: Slot, count: int) -> Cache:
        """A new cache with the first `count` positions of a donor's."""
        cache, source = self.empty(), donor.cache
        assert isinstance(cache, StaticCache) and isinstance(source, StaticCache)
        whole = cache.prefix + count
        for layer, other in zip(cache.layers, source.layers, strict=True):
            layer.restore(other.state(whole))
        cache.capacity, cache.length, cache.long = whole, count, source.long
        cache.seen = None if source.seen is None else source.seen[:, :count]
        return cache


def _position_bytes(cache: Cache) -> int:
    """Bytes that a position of an empty cache takes; 0 where that is bounded otherwise."""
    if not isinstance(cache, StaticCache):
        return 0
    cache.reserve(1)
    return -(-cache.nbytes // cache.capacity)
