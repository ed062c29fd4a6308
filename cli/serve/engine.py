"""The scheduler in a thread of its own, and the texts that clients wait for."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from optim.cli.serve.errors import Refused
from optim.cli.serve.metrics import Metrics
from optim.recipes.errors import OptimError

if TYPE_CHECKING:
    from optim.runtime.engine.scheduler import Scheduler
    from optim.runtime.engine.sequence import Event, Sequence

BUFFERED = 256  # events that a slow reader may be behind before its text pauses
AGAIN_IN = 5  # seconds after which to ask again for a text that could not be
ENDED = {
    "late": (503, "the text waited too long to begin", "queue_timeout"),
    "cancelled": (503, "the server is stopping", "stopping"),
    "memory": (503, "there was not enough memory for the text", "out_of_memory"),
    "error": (500, "the text could not be computed", "server_error"),
}
"""How a text ends that is no answer: what Refused says of it."""
SILENT = 30.0  # seconds without a step, while there is work, after which the server is not healthy
AGAIN = 60.0  # a second failure within so many seconds ends the server


class Reader:
    """Takes the events of one request's texts, in the order they come."""

    def __init__(self, engine: Engine, sequences: list[Sequence]) -> None:
        self._engine, self.sequences = engine, sequences
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.asked = time.monotonic()
        self.first = self.last = 0.0

    def put(self, event: Event) -> None:
        now, metrics = time.monotonic(), self._engine.metrics
        if event.token is not None:
            if self.first:
                metrics.between_tokens.add(now - self.last)
            else:
                self.first = now
                metrics.first_token.add(now - self.asked)
            self.last = now
            metrics.new_tokens += 1
        self.events.put_nowait(event)
        if self.events.qsize() > BUFFERED:
            for sequence in self.sequences:
                sequence.paused = True

    async def get(self) -> Event:
        """The next event; a text that waited for its reader goes on.

        Refused if the text ended otherwise than by its answer.
        """
        event = await self.events.get()
        if event.reason in ENDED:
            self.cancel()
            raise Refused(*ENDED[event.reason], wait=AGAIN_IN)
        if self.sequences[0].paused and self.events.qsize() < BUFFERED // 2:
            for sequence in self.sequences:
                sequence.paused = False
            self._engine.wake()
        return event

    def cancel(self) -> None:
        """Nobody waits for these texts any more."""
        for sequence in self.sequences:
            sequence.cancelled = True
        self._engine.wake()


class Engine:
    """One thread steps the scheduler; all else is called in the event loop's."""

    def __init__(
        self,
        scheduler: Scheduler,
        metrics: Metrics,
        queue: int,
        patience: float,
        broken: Callable[[str], None],
    ) -> None:
        self.scheduler, self.metrics, self.stopping = scheduler, metrics, False
        self._most = len(scheduler.slots.slots) + queue
        self._patience, self._broken = patience, broken
        self._readers: dict[Sequence, Reader] = {}
        self._loop = asyncio.get_running_loop()
        self._work, self._closed, self._failed = threading.Event(), False, 0.0
        self._seconds = 1.0  # what a text takes from its place in the queue's head, on average
        self.beat = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def live(self) -> int:
        """Texts that wait or are written."""
        return len(self._readers)

    @property
    def gauges(self) -> dict[str, float]:
        """What is so now, by name."""
        slots = self.scheduler.slots
        return {
            "live_texts": self.live,
            "waiting_texts": len(self.scheduler.waiting),
            "busy_slots": slots.busy,
            "kv_bytes": slots.nbytes,
        }

    @property
    def healthy(self) -> bool:
        silent = time.monotonic() - self.beat if self.live else 0.0
        return self._thread.is_alive() and silent < SILENT

    def submit(self, sequences: list[Sequence]) -> Reader:
        """Queue the texts of one request. Refused: 503 while stopping, 429 if there is no place."""
        if self.stopping:
            raise Refused(503, "the server is stopping", "stopping", wait=5)
        if self.live + len(sequences) > self._most:
            wait = self._seconds * self.live / len(self.scheduler.slots.slots)
            what = f"{self.live} texts are written or wait already: ask again later"
            raise Refused(429, what, "queue_full", wait=min(60, max(1, round(wait))))
        reader = Reader(self, sequences)
        for sequence in sequences:
            sequence.deadline = time.monotonic() + self._patience
            self._readers[sequence] = reader
            self.scheduler.submit(sequence)
        self.wake()
        return reader

    def wake(self) -> None:
        self._work.set()

    def end_all(self) -> None:
        """Cancel every text."""
        for reader in set(self._readers.values()):
            reader.cancel()

    def close(self, seconds: float) -> None:
        """End after the step that is under way, which is waited for."""
        self._closed = True
        self.wake()
        self._thread.join(timeout=seconds)

    def _run(self) -> None:
        try:
            while not self._closed:
                self._work.wait()
                self._work.clear()
                while not self.scheduler.idle and not self._closed:
                    self._step()
        except Exception as problem:
            self._say(f"the engine stopped: {type(problem).__name__}: {problem}")

    def _step(self) -> None:
        from optim.runtime.system.memory import is_memory_error

        self.beat = time.monotonic()
        events = self.scheduler.step()
        seconds = time.monotonic() - self.beat
        self._loop.call_soon_threadsafe(self._deliver, events, seconds)
        while self.scheduler.failures:
            problem = self.scheduler.failures.pop()
            if isinstance(problem, OptimError) or is_memory_error(problem):
                continue  # a text's own failure, such as logits that are no numbers
            if time.monotonic() - self._failed < AGAIN:
                raise problem
            self._failed = time.monotonic()
        if not events and self._waits_for_room():
            time.sleep(0.01)

    def _waits_for_room(self) -> bool:
        return self.scheduler.slots.busy == 0 or all(
            slot.owner is None or slot.owner.paused for slot in self.scheduler.slots.slots
        )

    def _say(self, words: str) -> None:
        self._loop.call_soon_threadsafe(self._broken, words)

    def _deliver(self, events: list[Event], seconds: float) -> None:
        self.metrics.steps += 1
        self.metrics.step.add(seconds)
        for event in events:
            sequence = event.sequence
            reader = self._readers[sequence]
            if event.reason:
                self._count(event, reader)
            reader.put(event)

    def _count(self, event: Event, reader: Reader) -> None:
        sequence = event.sequence
        del self._readers[sequence]
        self.metrics.ended[event.reason] += 1
        if sequence.begun:
            self.metrics.prompt_tokens += len(sequence.request.ids)
            self.metrics.cached_tokens += sequence.cached
            if sequence.drafts is not None:
                self.metrics.drafted_tokens += sequence.drafts.drafted
                self.metrics.accepted_tokens += sequence.drafts.accepted
            self._seconds += 0.2 * (time.monotonic() - sequence.begun - self._seconds)
