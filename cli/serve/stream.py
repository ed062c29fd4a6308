"""Answers as server-sent events, while they are written."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from optim.cli.serve.answers import Form
from optim.cli.serve.engine import Reader
from optim.cli.serve.errors import Refused


async def chat_events(form: Form, reader: Reader) -> AsyncIterator[str]:
    """The stream of a chat or a completion, as server-sent events.

    Refused, before there is any, if the text ends before it has begun.
    """
    event = await reader.get()
    for chunk in form.begin():
        yield sse(chunk)
    left = len(form.choices)
    try:
        while True:
            choice = form.add(event)
            for chunk in form.piece(choice, event):
                yield sse(chunk)
            left -= bool(event.reason)
            if not left:
                break
            event = await reader.get()
    except Refused as refused:
        yield sse(refused.body)
        return
    for chunk in form.last():
        yield sse(chunk)
    yield "data: [DONE]\n\n"


def sse(data: dict[str, Any], event: str = "") -> str:
    """One server-sent event."""
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {json.dumps(data, ensure_ascii=False)}\n\n"
