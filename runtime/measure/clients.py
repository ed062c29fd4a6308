"""Clients of a server that speaks OpenAI's API: what each is sent, and when it came.

Without a client library: what is measured is the server, and some send what no library would.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

CHAT = "/v1/chat/completions"
LONGEST = 1 << 20  # bytes that are read ahead


@dataclass(slots=True)
class Answer:
    """One reply while it comes."""

    status: int
    headers: dict[str, str]
    """By their names in small letters."""
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes."""
        if self.headers.get("transfer-encoding") != "chunked":
            while piece := await self.reader.read(1 << 16):
                yield piece
            return
        while size := int((await self.reader.readline()).strip() or b"0", 16):
            yield (await self.reader.readexactly(size + 2))[:size]

    async def whole(self) -> bytes:
        """All of the body."""
        return b"".join([piece async for piece in self.pieces()])

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """What a stream says, but for its `[DONE]`."""
        rest = b""
        async for piece in self.pieces():
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])


def request(body: Any, path: str = CHAT) -> bytes:
    """What is sent to ask for `body`: as JSON, or as the bytes that it is."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


@asynccontextmanager
async def asked(port: int, body: Any, path: str = CHAT) -> AsyncIterator[Answer]:
    """Ask the server at `port` of this machine for what `request` makes of `body`.

    Raises OSError or EOFError if the server hangs up.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=LONGEST)
    try:
        writer.write(request(body, path))
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines[1:] if line)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        yield Answer(int(lines[0].split()[1]), headers, reader, writer)
    finally:
        writer.transport.abort()


@dataclass(slots=True)
class Timed:
    """One streamed reply, on the clock of `time.perf_counter`: when it was asked for, and when its
    pieces came."""

    asked: float = field(default_factory=time.perf_counter)
    text: str = ""
    times: list[float] = field(default_factory=list)
    tokens: int = 0
    """As the server counts them."""


async def timed(port: int, body: dict[str, Any], told: Timed | None = None) -> Timed:
    """Ask for `body` as a stream, and note, in `told`, when each piece of text comes.

    RuntimeError if it is refused.
    """
    told = told or Timed()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async with asked(port, {**body, **options}) as answer:
        if answer.status != 200:
            raise RuntimeError(f"HTTP {answer.status}: {(await answer.whole())[:300]!r}")
        async for event in answer.events():
            now = time.perf_counter()
            text = "".join(c["delta"].get("content") or "" for c in event.get("choices") or ())
            if text:
                told.text += text
                told.times.append(now)
            if event.get("usage"):
                told.tokens = event["usage"]["completion_tokens"]
    return told
