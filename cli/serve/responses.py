"""The form of /v1/responses: one message of text, and the events of its stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from optim.cli.serve.answers import Form
from optim.cli.serve.engine import Reader
from optim.cli.serve.errors import Refused
from optim.cli.serve.stream import sse


def whole(form: Form, status: str = "") -> dict[str, Any]:
    """The response, as it is now."""
    choice, used = form.choices[0], form.usage()
    status = status or ("completed" if choice.finish == "stop" else "incomplete")
    why = {"reason": "max_output_tokens"} if status == "incomplete" else None
    begun = status == "in_progress"
    return {
        "id": form.id.replace("chatcmpl-", "resp_"),
        "object": "response",
        "created_at": form.created,
        "model": form.model,
        "status": status,
        "error": None,
        "incomplete_details": why,
        "output": [] if begun else [_message(form, "completed")],
        "parallel_tool_calls": False,
        "tool_choice": "none",
        "tools": [],
        "usage": None if begun else _usage(used),
    }


def _usage(used: dict[str, Any]) -> dict[str, Any]:
    return {
        "input_tokens": used["prompt_tokens"],
        "input_tokens_details": used["prompt_tokens_details"],
        "output_tokens": used["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": used["total_tokens"],
    }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": []}


def _message(form: Form, status: str) -> dict[str, Any]:
    content = [_part(form.choices[0].text)] if status == "completed" else []
    name = form.id.replace("chatcmpl-", "msg_")
    base = {"id": name, "type": "message", "role": "assistant"}
    return {**base, "status": status, "content": content}


async def response_events(form: Form, reader: Reader) -> AsyncIterator[str]:
    """The stream of a response, as server-sent events. Refused as `chat_events` is."""
    event, count = await reader.get(), 0

    def told(kind: str, **more: Any) -> str:
        nonlocal count
        count += 1
        return sse({"type": kind, "sequence_number": count - 1, **more}, kind)

    item = _message(form, "in_progress")
    place = {"item_id": item["id"], "output_index": 0, "content_index": 0}
    yield told("response.created", response=whole(form, "in_progress"))
    yield told("response.output_item.added", output_index=0, item=item)
    yield told("response.content_part.added", **place, part=_part(""))
    choice = form.choices[0]
    try:
        while True:
            form.add(event)
            if event.piece:
                yield told("response.output_text.delta", **place, delta=event.piece, logprobs=[])
            if choice.reason:
                break
            event = await reader.get()
    except Refused as refused:
        yield told("error", code=refused.code, message=refused.message, param=None)
        return
    yield told("response.output_text.done", **place, text=choice.text, logprobs=[])
    yield told("response.content_part.done", **place, part=_part(choice.text))
    yield told("response.output_item.done", output_index=0, item=_message(form, "completed"))
    ended = whole(form)
    yield told(f"response.{ended['status']}", response=ended)
