"""Throughput and latency of servers under clients that ask again as soon as they are answered."""

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from optim.runtime.measure.clients import timed

SHARES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
WORDS = [
    "river",
    "stone",
    "bread",
    "window",
    "letter",
    "garden",
    "winter",
    "engine",
    "paper",
    "silver",
    "morning",
    "market",
]
Told = Callable[[int, int, str], None]


@dataclass(slots=True)
class Crowd:
    """What some clients at once got from one server, over all rounds."""

    seconds: float = 0.0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    """Seconds from the request to the first piece of text."""
    between: list[float] = field(default_factory=list)
    """Seconds from one piece to the next."""

    @property
    def summary(self) -> dict[str, Any]:
        """Tokens a second, and milliseconds by their share."""
        return {
            "tokens_per_second": self.tokens / self.seconds,
            "first_ms": _shares(self.first),
            "between_ms": _shares(self.between),
        }


def serving(
    ports: dict[str, int], clients: Sequence[int], asked: dict[str, int], rounds: int, told: Told
) -> Iterator[dict[str, Any]]:
    """A row for each number of clients, and in it a summary for each server by its name.

    `asked`: `prompt` and `new` tokens of a request, about. The servers take turns, `rounds` times
    after one that is not counted; no two requests begin alike, so nothing is taken over.
    """
    done, total = 0, len(clients) * (rounds + 1) * len(ports)
    for count in clients:
        crowds = {name: Crowd() for name in ports}
        for turn in range(rounds + 1):
            for name, port in ports.items():
                told(done, total, f"{name}, {count} clients")
                done += 1
                crowd = Crowd() if turn == 0 else crowds[name]
                asyncio.run(_round(port, count, asked, done, crowd))
        yield {"clients": count, "servers": {n: c.summary for n, c in crowds.items()}}


async def _round(port: int, clients: int, asked: dict[str, int], seed: int, crowd: Crowd) -> None:
    """One request of each client, at once; of one client alone, four in turn."""
    draw, start = random.Random(seed), time.perf_counter()
    bodies = [_body(draw, asked) for _ in range(max(clients, 4))]
    if clients < len(bodies):
        lanes = [bodies[lane::clients] for lane in range(clients)]
    else:
        lanes = [[body] for body in bodies]

    async def client(lane: list[dict[str, Any]]) -> None:
        for body in lane:
            reply = await timed(port, body)
            crowd.tokens += reply.tokens
            crowd.first.append(reply.times[0] - reply.asked)
            crowd.between += [after - before for before, after in pairwise(reply.times)]

    await asyncio.gather(*map(client, lanes))
    crowd.seconds += time.perf_counter() - start


def _body(draw: random.Random, asked: dict[str, int]) -> dict[str, Any]:
    text = " ".join(draw.choices(WORDS, k=asked["prompt"]))
    what = f"{text}. Tell a long story with all of these words."
    messages = [{"role": "user", "content": what}]
    return {"messages": messages, "max_tokens": asked["new"], "temperature": 0}


def _shares(seconds: list[float]) -> dict[str, float]:
    seconds = sorted(seconds) or [0.0]
    return {name: seconds[int(len(seconds) * share)] * 1e3 for name, share in SHARES.items()}
