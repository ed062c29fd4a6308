"""The door: who may ask, from where, and in what form; before anything of a request is read.

A page of another site reaches a server of this machine through the browser: by a name that it
points here (so `Host` is checked), or by a form (so a POST has to be JSON, which a browser sends
to another site only after asking, and nobody answers that).
"""

from __future__ import annotations

import hmac
import re
import uuid
from collections import Counter
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from optim.cli.serve.errors import Refused

LOOPBACK = ("localhost", "127.0.0.1", "::1")
PUBLIC = ("/", "/health")
"""What is shown without a key: the page has no secret, and asks for the key itself."""
REQUEST_ID = re.compile(r"[\w.-]{1,64}")


@dataclass(slots=True)
class Guard:
    """An ASGI application around another one."""

    app: ASGIApp
    hosts: tuple[str, ...] | None
    """Names by which this server may be called; None: any."""
    key: str | None
    answered: Counter[int]
    """Counts responses by their status."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        name = given if REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex[:16]}"
        scope["request_id"] = name

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = MutableHeaders(scope=message)
                own["X-Request-Id"] = name
                self.answered[message["status"]] += 1
                own["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            self._check(scope, headers)
        except Refused as refused:
            await refused.response()(scope, receive, named)
            return
        await self.app(scope, receive, named)

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        if self.hosts is not None and _name(host) not in self.hosts:
            raise Refused(403, "this server is not called by that name", "host_not_allowed")
        if self.key is not None and scope["path"] not in PUBLIC:
            kind, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode(), self.key.encode())
            if kind.lower() != "bearer" or not right:
                raise Refused(401, "the API key is missing or wrong", "invalid_api_key")
        form = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and form != "application/json":
            what = "send the body as Content-Type: application/json"
            raise Refused(415, what, "unsupported_media_type")


def _name(host: str) -> str:
    """A `Host` without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()
