"""The routes, over one engine. No path of a request or of its body is ever opened."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from optim.cli.serve.answers import Form
from optim.cli.serve.asks import Asker
from optim.cli.serve.engine import Engine, Reader
from optim.cli.serve.errors import Refused
from optim.cli.serve.metrics import Metrics
from optim.cli.serve.protocol import Body, Chat, Completion, Responses
from optim.cli.serve.responses import response_events, whole
from optim.cli.serve.stream import chat_events

LARGEST = 4 << 20  # bytes of a body
BODY_SECONDS = 30.0
LOADING = "the model is being loaded"
PAGE = Path(__file__).with_name("page.html")
POLICY = (
    "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline';"
    " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(slots=True)
class Service:
    """What the routes share; `engine` and `asker` are set when the model is loaded."""

    metrics: Metrics
    log: Callable[[str], None]
    send_seconds: float
    """So long a client may leave what it was sent unread."""
    hang_up: Callable[[Scope], None]
    """Breaks off the connection of a request."""
    engine: Engine | None = None
    asker: Asker | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, Chat)

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, Completion)

    async def respond(self, request: Request) -> Response:
        return await self._answer(request, Responses)

    async def models(self, request: Request) -> Response:
        _, asker = self._ready()
        known = {"id": asker.name, "object": "model", "created": self.created}
        drawn = {"temperature": asker.defaults.temperature}
        facts = {"max_model_len": asker.slots.context, "default_sampling": drawn}
        entry = {**known, "owned_by": "optim", **facts}
        return JSONResponse({"object": "list", "data": [entry]})

    async def health(self, request: Request) -> Response:
        status, why = self._health()
        if not why:
            return JSONResponse({"status": status})
        return JSONResponse({"status": status, **Refused(503, why, status).body}, 503)

    def _health(self) -> tuple[str, str]:
        """In a word, and, unless all is well, in a sentence."""
        if self.engine is None:
            return "loading", LOADING
        if self.engine.stopping:
            return "draining", "the server is stopping"
        if not self.engine.healthy:
            return "silent", f"the last step was {time.monotonic() - self.engine.beat:.0f} s ago"
        return "ok", ""

    async def tell_metrics(self, request: Request) -> Response:
        text = self.metrics.text({} if self.engine is None else self.engine.gauges)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(self, request: Request) -> Response:
        headers = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer"}
        return Response(PAGE.read_bytes(), media_type="text/html; charset=utf-8", headers=headers)

    def _ready(self) -> tuple[Engine, Asker]:
        if self.engine is None or self.asker is None:
            raise Refused(503, LOADING, "loading", wait=2)
        return self.engine, self.asker

    async def _answer(self, request: Request, kind: type[Body]) -> Response:
        engine, asker = self._ready()
        data = await _body(request)
        ask = await asyncio.to_thread(asker.ask, kind, data)
        reader = engine.submit(ask.sequences)
        form = Form(ask, asker.name, asker.model.tokenizer)
        name = str(request.scope["request_id"])
        if ask.body.stream:
            make = response_events if kind is Responses else chat_events
            return Stream(self, reader, make(form, reader), name)
        collect = asyncio.create_task(_collect(form, reader))
        if not await _unless_gone(collect, request.receive, reader):
            self.told(reader, name, "gone")
            return Response(status_code=499)
        self.told(reader, name, form.choices[0].reason)
        collect.result()
        if kind is Responses:
            return JSONResponse(whole(form))
        return JSONResponse(form.whole())

    def told(self, reader: Reader, name: str, reason: str) -> None:
        """The line of a request: no text of anybody's."""
        prompt = sum(len(s.request.ids) for s in reader.sequences)
        new, now = sum(s.count for s in reader.sequences), time.monotonic()
        cached = sum(s.cached for s in reader.sequences)
        first = f"{(reader.first - reader.asked) * 1e3:.0f} ms" if reader.first else "-"
        rate = new / (now - reader.first) if reader.first and now > reader.first else 0.0
        counts = f"prompt {prompt} cached {cached} new {new}"
        self.log(f"{name} {counts} first {first} {rate:.1f} tok/s {reason}")


class Stream(Response):
    """Events that are sent as they come; a client that goes, or does not read, ends them.

    The status is sent with the first of them: a text that never begins is refused.
    """

    def __init__(
        self, service: Service, reader: Reader, events: AsyncIterator[str], name: str
    ) -> None:
        super().__init__(media_type="text/event-stream; charset=utf-8")
        self._service, self._reader, self._events, self._name = service, reader, events, name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        job = asyncio.create_task(self._send(scope, receive, send))
        here = await _unless_gone(job, receive, self._reader)
        reason = job.result() or self._reader.sequences[0].reason if here else "gone"
        self._service.told(self._reader, self._name, reason)

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> str:
        """All events; why they ended before the text did, if so."""

        async def out(data: bytes, more: bool) -> None:
            message = {"type": "http.response.body", "body": data, "more_body": more}
            await asyncio.wait_for(send(message), self._service.send_seconds)

        try:
            text = await anext(self._events)
            heads = [(b"content-type", b"text/event-stream; charset=utf-8")]
            heads += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
            await send({"type": "http.response.start", "status": 200, "headers": heads})
            await out(text.encode("utf-8", "replace"), True)
            async for text in self._events:
                await out(text.encode("utf-8", "replace"), True)
            await out(b"", False)
        except Refused as refused:
            await refused.response()(scope, receive, send)
        except (TimeoutError, OSError):
            self._reader.cancel()
            self._service.hang_up(scope)
            return "unread"
        return ""


async def _collect(form: Form, reader: Reader) -> None:
    """All events of a request. Refused as `Reader.get` is."""
    left = len(form.choices)
    while left:
        event = await reader.get()
        form.add(event)
        left -= bool(event.reason)


async def _unless_gone(job: asyncio.Task[Any], receive: Receive, reader: Reader) -> bool:
    """Wait for `job`; False, and its texts cancelled, if the client leaves before."""
    gone = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
        return job.done()
    finally:
        if not job.done():
            reader.cancel()
        for task in (job, gone):
            task.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes:
    """The body. Refused: 413 if it is too long, 408 if it does not come."""
    too_long = Refused(413, f"a body has {LARGEST} bytes at most", "body_too_large")
    said = request.headers.get("content-length", "0")
    if said.isdecimal() and int(said) > LARGEST:
        raise too_long
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                data += piece
                if len(data) > LARGEST:
                    raise too_long
    except TimeoutError:
        raise Refused(408, "the body did not come in time", "body_timeout") from None
    except ClientDisconnect:
        raise Refused(400, "the client left", "gone") from None
    return bytes(data)


async def _no_embeddings(request: Request) -> Response:
    what = "a chat model's embeddings are poor: this server gives none"
    raise Refused(404, what, "not_available")


def application(service: Service) -> Starlette:
    """The routes of `service`."""

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return error.response()

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        words = {404: "there is no such address", 405: "this address wants another method"}
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        said = Refused(error.status_code, words.get(error.status_code, error.detail), code)
        return said.response()

    async def failed(request: Request, error: Exception) -> Response:
        service.log(f"{request.scope.get('request_id')} failed: {type(error).__name__}")
        return Refused(500, "the server failed at this request", "server_error").response()

    routes = [
        Route("/", service.page),
        Route("/health", service.health),
        Route("/metrics", service.tell_metrics),
        Route("/v1/models", service.models),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/completions", service.complete, methods=["POST"]),
        Route("/v1/responses", service.respond, methods=["POST"]),
        Route("/v1/embeddings", _no_embeddings, methods=["POST"]),
    ]
    handlers: Any = {Refused: refused, HTTPException: unknown, Exception: failed}
    return Starlette(routes=routes, exception_handlers=handlers)
