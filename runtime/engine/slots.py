"""The places of texts that are written side by side: each has a cache, kept for the next text.

A new text takes over what an old one has read, if they begin alike. Only whole pieces of `READ`
tokens of a prompt are taken over: a prompt is always read in the same pieces, so a text's numbers
are, in every bit, those that it would have had alone.
"""

import time
from dataclasses import dataclass, field

from optim.runtime.cache.full import CHUNK, Cache, Policy, StaticCache
from optim.runtime.engine.load import Model
from optim.runtime.engine.sequence import Sequence

READ = 32
"""Tokens of a prompt that are read at a time: a longer piece would hold up the other texts."""


@dataclass(slots=True, eq=False)
class Slot:
    """A cache, the prompt whose whole pieces it holds, and whose text is in it now."""

    cache: Cache | None = None
    read: list[int] = field(default_factory=list)
    """Tokens of a prompt that were read in whole pieces; the cache may hold more."""
    owner: Sequence | None = None
    used: float = 0.0

    def shares(self, ids: list[int]) -> int:
        """So many tokens of `ids` need not be read again; at least one is left."""
        pairs = enumerate(zip(self.read, ids[:-1], strict=False))
        least = min(len(self.read), len(ids) - 1)
        alike = next((i for i, (a, b) in pairs if a != b), least)
        return alike // READ * READ

    def clear(self) -> None:
        self.cache, self.read, self.owner = None, [], None


class Slots:
    """`count` slots, which hold at most `most_bytes` of keys and values together."""

    def __init__(
        self,
        model: Model,
        count: int,
        context: int,
        most_bytes: int | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.model, self.context, self.policy = model, context, policy
        self.slots = [Slot() for _ in range(count)]
        self.position_bytes, self._exact = self._probe()
        self.most_bytes = most_bytes or count * self._bytes(context)

    def _probe(self) -> tuple[int, bool]:
        """Bytes a position takes, and whether a cache that was cut back is as if never longer."""
        cache = self._empty()
        if not isinstance(cache, StaticCache):
            return 0, False
        cache.reserve(1)
        # What is older is kept at 4 bits, and a shorter text would have it at 8.
        whole = self.policy is None or (self.policy.bits != 4 and self.policy.kind == "full")
        return -(-cache.nbytes // cache.capacity), whole

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held now."""
        return sum(slot.cache.nbytes for slot in self.slots if slot.cache is not None)

    @property
    def busy(self) -> int:
        return sum(slot.owner is not None for slot in self.slots)

    def ever_fits(self, sequence: Sequence) -> bool:
        """Whether the text would fit if it were alone."""
        return self._bytes(sequence.most) <= self.most_bytes

    def place(self, sequence: Sequence) -> Slot | None:
        """A slot for a text, with as much of its prompt as is there; None if it has to wait."""
        free = [slot for slot in self.slots if slot.owner is None]
        if not free or not self._room(sequence, free):
            return None
        ids = sequence.request.ids
        slot = max(free, key=lambda slot: (slot.shares(ids), -slot.used))
        shared = slot.shares(ids) if self._exact else 0
        donor = max(self.slots, key=lambda slot: slot.shares(ids))
        if self._exact and donor.shares(ids) > shared:
            shared = donor.shares(ids)
            slot.cache = self._copy(donor, shared)
        elif slot.cache is None or not shared:
            slot.cache = self._empty()
        slot.cache.truncate(shared)
        slot.read, slot.owner, sequence.cached = ids[:shared], sequence, shared
        return slot

    def release(self, slot: Slot, keep: bool = True) -> None:
        """Its text has ended; what was read of the prompt waits for the next one, if `keep`."""
        slot.owner, slot.used = None, time.monotonic()
        if not keep or not self._exact:
            slot.clear()

    def _room(self, sequence: Sequence, free: list[Slot]) -> bool:
        """Whether the text fits beside those that are written now; old ones make room."""
        taken = sum(self._bytes(s.owner.most) for s in self.slots if s.owner is not None)
        need = taken + self._bytes(sequence.most)
        if need > self.most_bytes:
            return False
        kept = sum(slot.cache.nbytes for slot in free if slot.cache is not None)
        for slot in sorted(free, key=lambda slot: slot.used):
            if need + kept <= self.most_bytes:
                break
            kept -= slot.cache.nbytes if slot.cache is not None else 0
            slot.clear()
        return True

    def _bytes(self, positions: int) -> int:
        """At most so many for a text of `positions`: a cache grows by halves of itself."""
        most = min(self.context, -(-positions * 3 // 2 // CHUNK) * CHUNK)
        return most * self.position_bytes

    def _copy(self, donor: Slot, count: int) -> Cache:
        """A new cache with the first `count` positions of a donor's."""
        cache, source = self._empty(), donor.cache
        assert isinstance(cache, StaticCache) and isinstance(source, StaticCache)
        whole = cache.prefix + count
        for layer, other in zip(cache.layers, source.layers, strict=True):
            layer.restore(other.state(whole))
        cache.capacity, cache.length, cache.long = whole, count, source.long
        cache.seen = None if source.seen is None else source.seen[:, :count]
        return cache

    def _empty(self) -> Cache:
        return self.model.new_cache(length=self.context, policy=self.policy)
