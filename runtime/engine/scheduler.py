"""Many texts at once: they come and go at every step, and each is written as if it were alone.

A step gives every text that is being written its next token, and reads on in one prompt for a turn.
A turn ends between two blocks of the model, wherever that is in the prompt: how long the others
wait does not depend on the length of a piece, nor a text's numbers on how others took their turns.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from collections.abc import Sequence as Row

import torch
from torch import Tensor

from optim.runtime.cache.full import Cache, Policy
from optim.runtime.engine.load import Model
from optim.runtime.engine.sampling import Guess
from optim.runtime.engine.sequence import Answer, Event, Request, Sequence
from optim.runtime.engine.slots import Slot, Slots
from optim.runtime.system.memory import is_memory_error

TURN = 0.04
"""Seconds that a step reads in a prompt, and not much more: one block, at least."""


class Scheduler:
    """`submit` texts, then call `step` until there is nothing left to do; it has no thread.

    `submit` may be called, and `Sequence.cancelled` be set, by another thread than `step`'s.
    """

    def __init__(self, slots: Slots, turn: float | None = None) -> None:
        """`turn`: seconds that a step reads in a prompt while others wait; None: TURN."""
        self.slots, self.model = slots, slots.model
        self._turn = TURN if turn is None else turn
        self.waiting: deque[Sequence] = deque()
        self._running: list[Slot] = []
        self._reading: tuple[Slot, Generator[None, None, Tensor]] | None = None
        self.failures: list[Exception] = []
        """What ended texts as "error" or "memory"; whoever steps looks, and empties it."""
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
        reader = self._reading[0] if self._reading else None
        writing = [s for s in self._running if s is not reader and not _owner(s).paused]
        if writing:
            events += self._guarded(writing, self._write)
        if reader is not None:
            events += self._guarded([reader], self._read)
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
        if not self.waiting or self._reading:
            return
        slot = self.slots.place(self.waiting[0])
        if slot is not None:
            sequence = self.waiting.popleft()
            sequence.begun = time.monotonic()
            self._running.append(slot)
            ids = sequence.request.ids[sequence.cached :]
            self._reading = slot, self.model.read(ids, _cache(slot))

    def _guarded(self, slots: list[Slot], run: Callable[[list[Slot]], list[Event]]) -> list[Event]:
        """`run(slots)`; if it fails their texts end, and their caches are not used again."""
        try:
            return run(slots)
        except Exception as problem:
            return [self._failed(slot, problem) for slot in slots]

    def _failed(self, slot: Slot, problem: Exception) -> Event:
        self.failures.append(problem)
        short = is_memory_error(problem)
        if short:
            self.slots.forget()
        return self._ended(slot, "memory" if short else "error", keep=False)

    def _read(self, slots: list[Slot]) -> list[Event]:
        """Read on in a prompt; at its end, write the first token."""
        assert self._reading is not None
        slot, blocks = self._reading
        cache, end = _cache(slot), time.perf_counter() + self._turn
        before = cache.length
        try:
            next(blocks)
            while time.perf_counter() < end:
                next(blocks)
        except StopIteration as read:
            self._reading = None
            return self._taken(slot, read.value)
        finally:
            self.read_tokens += cache.length - before
        return []

    def _write(self, slots: list[Slot]) -> list[Event]:
        """The next token of every text, or several of one that is written alone.

        Where memory does not do for all, the text that began last ends, and the others go on.
        """
        if len(slots) == 1 and _owner(slots[0]).drafts is not None:
            return self._guess(slots[0])
        held = [_cache(slot).length for slot in slots]
        work = [(_cache(slot), [_owner(slot).history[-1]]) for slot in slots]
        try:
            rows = self.model.step_many(work, _best(map(_owner, slots)))
        except Exception as problem:
            if len(slots) == 1 or not is_memory_error(problem):
                raise
            for slot, length in zip(slots, held, strict=True):
                _cache(slot).truncate(length)
            youngest = max(slots, key=lambda slot: _owner(slot).begun)
            event = self._failed(youngest, problem)
            others = [slot for slot in slots if slot is not youngest]
            return [event, *self._guarded(others, self._write)]
        return [e for slot, row in zip(slots, rows, strict=True) for e in self._taken(slot, row)]

    def _guess(self, slot: Slot) -> list[Event]:
        """The next tokens of a text: as many as are guessed right, and one more."""
        sequence, cache = _owner(slot), _cache(slot)
        drafts = sequence.drafts
        assert drafts is not None
        guesses = sequence.guesses()
        guesses = guesses[: self.model.undoable(cache, 1 + len(guesses)) - 1]
        start = time.perf_counter()
        tokens = [sequence.history[-1], *(guess.token for guess in guesses)]
        (rows,) = self.model.step_many([(cache, tokens)], sequence.best)
        seconds = time.perf_counter() - start
        events = self._taken(slot, rows, guesses)
        drafts.learn(len(guesses), len(events) - 1, seconds)
        return events

    def _taken(self, slot: Slot, rows: Tensor, guesses: Row[Guess] = ()) -> list[Event]:
        """The tokens that a text draws from `rows` `[k, vocab]`, which follow k - 1 `guesses`."""
        sequence, cache, events = _owner(slot), _cache(slot), list[Event]()
        try:
            for row, guess in zip(rows, [*guesses, None], strict=True):
                held = len(sequence.history)
                events.append(sequence.take(row, guess))
                if events[-1].reason or guess is None or sequence.history[-1] != guess.token:
                    break
        except Exception as problem:  # of this text alone
            return [*events, self._failed(slot, problem)]
        if guesses:
            cache.truncate(held)  # the wrong ones
        self.written_tokens += sum(event.token is not None for event in events)
        if events[-1].reason:
            self._leave(slot)
        return events

    def _ended(self, slot: Slot, reason: str, keep: bool = True) -> Event:
        event = _owner(slot).end(reason)
        self._leave(slot, keep)
        return event

    def _leave(self, slot: Slot, keep: bool = True) -> None:
        if self._reading and self._reading[0] is slot:
            self._reading = None
        self._running.remove(slot)
        self.slots.release(slot, keep)


def write(sequence: Sequence, slots: Slots) -> Generator[list[Event], None, None]:
    """Write one text with nobody beside it; yields what each step gave, raises what one fails with.

    It may be closed or interrupted anywhere: its slot keeps what was read and written.
    """
    loop = Scheduler(slots)
    loop.submit(sequence)
    try:
        while not sequence.reason:
            events = loop.step()
            if loop.failures:
                raise loop.failures[0]
            yield events
    finally:
        for slot in slots.slots:
            if slot.owner is sequence:
                _cache(slot).truncate(len(sequence.history) - 1)  # what follows may be a guess
                slots.release(slot)


def answer_all(
    model: Model,
    requests: Row[Request],
    *,
    context: int,
    size: int = 8,
    policy: Policy | None = None,
) -> Iterator[tuple[int, Answer]]:
    """Answer all, `size` side by side, the longest first; yields each answer with its number.

    Raises what a step fails with.
    """
    slots = Slots(model, size, context, policy=policy)
    loop, numbers = Scheduler(slots, turn=math.inf), dict[Sequence, int]()  # nobody waits
    for number in sorted(range(len(requests)), key=lambda i: -len(requests[i].ids)):
        sequence = Sequence(model, requests[number], slots.limit)
        numbers[sequence] = number
        loop.submit(sequence)
    pieces: list[list[str]] = [[] for _ in requests]
    while not loop.idle:
        events = loop.step()
        if loop.failures:
            raise loop.failures[0]
        for event in events:
            number = numbers[event.sequence]
            pieces[number].append(event.piece)
            if event.reason:
                yield number, Answer("".join(pieces[number]), event.sequence.count, event.reason)


def _best(sequences: Iterable[Sequence]) -> int:
    """So many of the largest logits decide for every one of them; 0: all."""
    counts = [sequence.best for sequence in sequences]
    return max(counts) if all(counts) else 0


def _owner(slot: Slot) -> Sequence:
    assert slot.owner is not None
    return slot.owner


def _cache(slot: Slot) -> Cache:
    assert slot.cache is not None
    return slot.cache
