"""Answers as server-sent events, while they are written."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from optim.cli.serve.answers import Form
from optim.cli.serve.engine import Reader
from optim.cli.serve.errors import Refused

ENDED = {
    "late": Refused(503, "the text waited too long to begin", "queue_timeout", wait=5),
    "cancelled": Refused(503, "the server is stopping", "stopping", wait=5),
    "error": Refused(500, "the text could not be computed", "server_error"),
}
"""How a text ends that is no answer."""


async def chat_events(form: Form, reader: Reader) -> AsyncIterator[str]:
    """The stream of a chat or a completion, as server-sent events."""
    for chunk in form.begin():
        yield sse(chunk)
    left = len(form.choices)
    while left:
        event = await reader.get()
        if event.reason in ENDED:
            reader.cancel()
            yield sse(ENDED[event.reason].body)
            return
        choice = form.add(event)
        left -= bool(event.reason)
        for chunk in form.piece(choice, event):
            yield sse(chunk)
    for chunk in form.last():
        yield sse(chunk)
    yield "data: [DONE]\n\n"


def sse(data: dict[str, Any], event: str = "") -> str:
    """One server-sent event."""
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {json.dumps(data, ensure_ascii=False)}\n\n"
