"""Many texts at once: they come and go at every step, and each is written as if it were alone.

A step reads one piece of one prompt, and gives every text that is being written its next token.
"""

import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from optim.recipes.errors import OptimError
from optim.runtime.cache.full import Cache
from optim.runtime.engine.load import Model
from optim.runtime.engine.sequence import Event, Sequence
from optim.runtime.engine.slots import READ, Slot, Slots


class Scheduler:
    """`submit` texts, then call `step` until there is nothing left to do; it has no thread.

    `submit` may be called, and `Sequence.cancelled` be set, by another thread than `step`'s.
    """

    def __init__(self, model: Model, slots: Slots) -> None:
        self.model, self.slots = model, slots
        self.waiting: deque[Sequence] = deque()
        self._running: list[Slot] = []
        self._next: dict[Slot, int] = {}  # the token that each text's cache has not seen
        self.failures: list[Exception] = []
        """What ended texts as "error"; whoever steps looks, and empties it."""
        self.read_tokens = 0
        self.written_tokens = 0

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing."""
        owners = [_owner(slot) for slot in self._running]
        return not self.waiting and all(one.paused and not one.cancelled for one in owners)

    def submit(self, sequence: Sequence) -> None:
        """Put a text at the end of the queue."""
        self.waiting.append(sequence)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One step for every text; what it gave.

        A failure ends the texts that were part of it, and goes to `failures`.
        """
        events = self._dropped()
        self._admit()
        reading = next((slot for slot in self._running if slot not in self._next), None)
        if reading is not None:
            events += self._guarded([reading], self._read)
        writing = [s for s in self._running if s in self._next and not _owner(s).paused]
        if writing:
            events += self._guarded(writing, self._write)
        return events

    def _dropped(self) -> list[Event]:
        """Take out what nobody waits for any more, before anything is computed for it."""
        events = []
        for _ in range(len(self.waiting)):
            sequence = self.waiting.popleft()
            reason = "cancelled" if sequence.cancelled else "late" if sequence.late() else ""
            if reason:
                events.append(sequence.end(reason))
            else:
                self.waiting.append(sequence)
        for slot in [slot for slot in self._running if _owner(slot).cancelled]:
            events.append(self._ended(slot, "cancelled"))
        return events

    def _admit(self) -> None:
        """Begin the text that has waited longest, unless another prompt is being read."""
        if not self.waiting or len(self._next) < len(self._running):
            return
        slot = self.slots.place(self.waiting[0])
        if slot is not None:
            self.waiting.popleft().begun = time.monotonic()
            self._running.append(slot)

    def _guarded(self, slots: list[Slot], run: Callable[[list[Slot]], list[Event]]) -> list[Event]:
        """`run(slots)`; if it fails their texts end, and their caches are not used again."""
        try:
            return run(slots)
        except Exception as problem:
            self.failures.append(problem)
            return [self._ended(slot, "error", keep=False) for slot in slots]

    def _read(self, slots: list[Slot]) -> list[Event]:
        """Read the next piece of a prompt; after the last one, write the first token."""
        (slot,) = slots
        ids, cache = _owner(slot).request.ids, _cache(slot)
        start = cache.length
        piece = ids[start : start + READ]
        logits = self.model.forward(torch.tensor([piece]), cache)
        self.read_tokens += len(piece)
        if len(piece) == READ:
            slot.read = ids[: start + READ]
        return self._taken(slot, logits[0]) if start + len(piece) == len(ids) else []

    def _write(self, slots: list[Slot]) -> list[Event]:
        """The next token of every text."""
        work = [(_cache(slot), [self._next[slot]]) for slot in slots]
        rows = self.model.step_many(work)
        return [
            e for slot, row in zip(slots, rows, strict=True) for e in self._taken(slot, row[-1])
        ]

    def _taken(self, slot: Slot, logits: Tensor) -> list[Event]:
        sequence = _owner(slot)
        try:
            event = sequence.take(logits)
        except OptimError as problem:  # of this text alone
            self.failures.append(problem)
            return [self._ended(slot, "error", keep=False)]
        if event.token is not None:
            self.written_tokens += 1
        if event.reason:
            self._leave(slot)
        else:
            self._next[slot] = sequence.history[-1]
        return [event]

    def _ended(self, slot: Slot, reason: str, keep: bool = True) -> Event:
        event = _owner(slot).end(reason)
        self._leave(slot, keep)
        return event

    def _leave(self, slot: Slot, keep: bool = True) -> None:
        self._next.pop(slot, None)
        self._running.remove(slot)
        self.slots.release(slot, keep)


def _owner(slot: Slot) -> Sequence:
    assert slot.owner is not None
    return slot.owner


def _cache(slot: Slot) -> Cache:
    assert slot.cache is not None
    return slot.cache
