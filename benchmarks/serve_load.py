"""A server under clients that crowd, leave, stop reading, and send what they should not.

    optim quantize demo -m rtn --group-size 64 --lm-head-bits 8 -o g64-head8
    python benchmarks/serve_load.py g64-head8 --seconds 600

Every answer has to be the one that the same request gets alone, and memory must not grow. Exit code
1 if something does not hold.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from http.client import HTTPConnection
from itertools import pairwise
from pathlib import Path
from typing import Any

from optim.runtime.measure.clients import Timed, asked, request, timed
from optim.runtime.measure.servers import optim_server, started
from optim.runtime.measure.serving import WORDS

SLOTS, QUEUE = 4, 16
BROKEN = [
    b"{",
    b"\xff\xfe",
    b"[]",
    b"",
    b"[" * 50_000,
    b'{"messages": []}',
    b" " * (4 << 20) + b"{}",
]
REFUSED = {400, 413}


def body(number: int, new: int = 24) -> dict[str, Any]:
    """Request `number`: some share their beginning, half are drawn and half are greedy."""
    some = random.Random(number)
    text = "Tell me of the old house. " * (number % 4) + " ".join(some.choices(WORDS, k=12))
    drawn = {"temperature": 0.8, "seed": number} if number % 2 else {"temperature": 0}
    return {"messages": [{"role": "user", "content": text}], "max_tokens": new, **drawn}


@dataclass(slots=True)
class Load:
    """What clients do to the server at `port`, and what they found."""

    port: int
    process: int
    alone: dict[int, str] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def get(self, path: str) -> str:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path)
        text = connection.getresponse().read().decode()
        connection.close()
        return text

    def metric(self, name: str) -> float:
        lines = self.get("/metrics").splitlines()
        return next((float(x.split()[1]) for x in lines if x.split()[0] == f"optim_{name}"), 0.0)

    def resident(self) -> int:
        """Bytes that the server holds."""
        pages = Path(f"/proc/{self.process}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.process}/fd"))

    async def idle(self) -> None:
        while await asyncio.to_thread(self.metric, "live_texts"):
            await asyncio.sleep(0.05)

    async def one(self, number: int) -> None:
        """An answer, whole or as a stream: the one that it is alone."""
        asking = body(number)
        if self.done.total() % 3 == 0:
            status, text = await self._whole(asking)
        else:
            status, text = await self._stream(asking, 0.0)
        self.done[str(status)] += 1
        if status == 429:
            await asyncio.sleep(0.2)
        elif status != 200:
            self.wrong.append(f"{number}: HTTP {status} {text[:200]}")
        elif text != self.alone.setdefault(number, text):
            self.wrong.append(f"{number}: {text!r} is not {self.alone[number]!r}")

    async def _whole(self, asking: dict[str, Any]) -> tuple[int, str]:
        async with asked(self.port, asking) as answer:
            said = json.loads(await answer.whole())
            if answer.status != 200:
                return answer.status, json.dumps(said["error"])
            return 200, said["choices"][0]["message"]["content"]

    async def _stream(self, asking: dict[str, Any], wait: float) -> tuple[int, str]:
        async with asked(self.port, {**asking, "stream": True}) as answer:
            if answer.status != 200:
                return answer.status, (await answer.whole()).decode()
            text = ""
            async for event in answer.events():
                await asyncio.sleep(wait)
                if "error" in event:
                    return 500, json.dumps(event)
                text += event["choices"][0]["delta"].get("content", "")
            return 200, text

    async def slow(self, number: int) -> None:
        """A stream that is read slowly, to its end."""
        status, text = await self._stream(body(number), 0.05)
        self.done["slow"] += status == 200
        if status == 200 and text != self.alone.setdefault(number, text):
            self.wrong.append(f"slow {number}: {text!r} is not {self.alone[number]!r}")

    async def leave(self, number: int) -> None:
        """Gone before the answer, or in its midst."""
        after = number % 5
        async with asked(self.port, {**body(number, 500), "stream": True}) as answer:
            async for _ in answer.events():
                after -= 1
                if after < 0:
                    break
        self.done["left"] += 1

    async def vanish(self, number: int) -> None:
        """Sends a request, or half of one, and reads nothing of a large answer before it goes."""
        long = {"stream": True, "logprobs": True, "top_logprobs": 20}
        data = request(body(number, 500) | long)
        _, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1024)
        writer.write(data[: None if number % 4 else -9])
        await asyncio.sleep((0, 0.1, 1, 4)[number % 4])
        writer.transport.abort()
        self.done["vanished"] += 1

    async def break_in(self, number: int) -> None:
        """A body that is none, or far too long a prompt: refused with a sentence."""
        bad: Any = BROKEN[number % len(BROKEN)]
        if number % 4 == 0:
            bad = body(number) | {"messages": [{"role": "user", "content": "long " * 20_000}]}
        try:
            async with asked(self.port, bad) as answer:
                said = json.loads(await answer.whole())
        except (OSError, EOFError):  # refused while it was still being sent
            self.done["cut off"] += 1
            return
        self.done["refused"] += 1
        if answer.status not in REFUSED or not said["error"]["message"]:
            self.wrong.append(f"a bad body: HTTP {answer.status}")


async def alone(load: Load, count: int) -> None:
    """What each request is answered with nobody beside it."""
    for number in range(count):
        _, load.alone[number] = await load._whole(body(number))


async def burst(load: Load) -> dict[str, Any]:
    """64 at once on 4 slots and a queue of 16: who is answered, and who is told to come again."""
    codes: Counter[str] = Counter()
    ready = asyncio.Event()

    async def one(number: int) -> None:
        await ready.wait()
        async with asked(load.port, body(number, 200)) as answer:
            said = json.loads(await answer.whole())
        codes[str(answer.status)] += 1
        if answer.status == 429 and not 1 <= int(answer.headers["retry-after"]) <= 60:
            load.wrong.append(f"429 with Retry-After {answer.headers['retry-after']}")
        if answer.status == 200:
            answers[number] = said["choices"][0]["message"]["content"]

    answers: dict[int, str] = {}
    tasks = [asyncio.create_task(one(number)) for number in range(64)]
    await asyncio.sleep(0.1)
    ready.set()
    await asyncio.gather(*tasks)
    for number, text in answers.items():
        if (await load._whole(body(number, 200)))[1] != text:
            load.wrong.append(f"{number} of the burst is not as it is alone")
    if codes != {"200": SLOTS + QUEUE, "429": 64 - SLOTS - QUEUE}:
        load.wrong.append(f"the burst: {dict(codes)}")
    return dict(codes)


async def gaps(load: Load, words: int, rounds: int) -> dict[str, float]:
    """Milliseconds between tokens of a text while the prompt of another one is read."""
    found: list[float] = []
    for turn in range(rounds):
        told = Timed()
        writing = asyncio.create_task(timed(load.port, body(2, 2000), told))
        while not told.times:
            await asyncio.sleep(0.01)
        text = f"{turn} " + "a " * words
        long = body(turn, 1) | {"messages": [{"role": "user", "content": text}]}
        reading = await timed(load.port, long)
        writing.cancel()
        await load.idle()
        inside = [t for t in told.times if reading.asked <= t <= reading.times[0]]
        found += [b - a for a, b in pairwise(inside)]
    found.sort()
    ranks = {"p50": 0.5, "p99": 0.99}
    made = {name: found[int(len(found) * share)] * 1e3 for name, share in ranks.items()}
    return {**made, "max": found[-1] * 1e3, "gaps": len(found)}


async def leaving(load: Load, rounds: int) -> dict[str, int]:
    """Tokens that are computed for a client after it has gone."""
    more: Counter[str] = Counter()
    for turn in range(rounds):
        before, got = await asyncio.to_thread(load.metric, "new_tokens_total"), 0
        async with asked(load.port, {**body(turn, 2000), "stream": True}) as answer:
            async for event in answer.events():
                got += bool(event["choices"][0]["delta"].get("content"))
                if got == 20 + turn:
                    break
        await load.idle()
        more[str(int(await asyncio.to_thread(load.metric, "new_tokens_total") - before) - got)] += 1
    return dict(more)


async def soak(load: Load, options: argparse.Namespace) -> dict[str, Any]:
    """All kinds of clients at once, for some time."""
    files, seconds = load.files(), options.seconds
    await alone(load, options.texts)
    end, sizes = time.monotonic() + seconds, list[int]()
    kinds: list[Callable[[int], Awaitable[None]]] = [load.one] * 7
    kinds += [load.leave, load.vanish, load.break_in, load.slow]

    async def client(number: int) -> None:
        some = random.Random(number)
        while time.monotonic() < end:
            try:
                await some.choice(kinds)(some.randrange(len(load.alone)))
            except (OSError, EOFError) as problem:
                load.wrong.append(f"the server hung up: {problem!r}")

    tasks = [asyncio.create_task(client(number)) for number in range(options.clients)]
    while time.monotonic() < end:
        await asyncio.sleep(min(1.0, seconds / 20))
        sizes.append(load.resident())
    await asyncio.gather(*tasks)
    await load.idle()
    early = statistics.median(sizes[len(sizes) // 5 : 2 * len(sizes) // 5])
    late = statistics.median(sizes[-len(sizes) // 5 :])
    await asyncio.sleep(6)  # connections that are kept for another request are let go
    return {
        "seconds": seconds,
        "clients": options.clients,
        "done": dict(load.done),
        "resident": {"early": early, "late": late, "growth": late / early - 1},
        "open files": {"before": files, "after": load.files()},
    }


async def measure(options: argparse.Namespace, load: Load) -> None:
    """The stages that were asked for, each printed when it is done."""
    stages: dict[str, Callable[[], Awaitable[Any]]] = {
        "burst": lambda: burst(load),
        "gap": lambda: gaps(load, options.prompt, options.rounds),
        "leaving": lambda: leaving(load, options.rounds),
        "soak": lambda: soak(load, options),
    }
    for stage in options.stages.split(","):
        print(json.dumps({stage: await stages[stage]()}), flush=True)
    print(json.dumps({"wrong": load.wrong[:20]}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--stages", default="burst,gap,leaving,soak")
    parser.add_argument("--seconds", type=float, default=60, help="of the soak")
    parser.add_argument("--clients", type=int, default=64, help="of the soak")
    parser.add_argument("--texts", type=int, default=40, help="different requests of the soak")
    parser.add_argument("--rounds", type=int, default=10, help="of gaps, and of clients that leave")
    parser.add_argument("--prompt", type=int, default=2000, help="words of a long prompt")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--speculate", default="auto", help="off: a token a step, for `leaving`")
    options = parser.parse_args()
    command = optim_server(options.model, options.context, SLOTS, 1)
    command += ["--queue", str(QUEUE), "--send-timeout", "5", "--speculate", options.speculate]
    with started(command) as (process, port):
        load = Load(port, process.pid)
        asyncio.run(measure(options, load))
    return bool(load.wrong)


if __name__ == "__main__":
    sys.exit(main())
