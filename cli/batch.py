"""`optim run --batch`: a JSON object a line in, a JSON object a line out, in the order asked.

A line is `{"prompt": ...}` or `{"messages": [...]}`, with an `id`, a `system` prompt and sampling
parameters if wanted. A line that cannot be answered gets a row with its `error`; the rest goes on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from optim.cli import ui
from optim.cli.conversation.input import decode
from optim.recipes.errors import USAGE, OptimError

if TYPE_CHECKING:
    from optim.runtime.engine.load import Model
    from optim.runtime.engine.sampling import Sampling
    from optim.runtime.engine.sequence import Request

PARAMETERS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "max_tokens")


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    role: Literal["system", "user", "assistant"]
    content: str


class Line(BaseModel):
    """What a line may say. A parameter that is left out is the command's."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    id: str | int | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    system: str | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: list[str] | None = None

    @model_validator(mode="after")
    def _one_question(self) -> Line:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either a prompt or messages")
        if self.messages is not None and not self.messages:
            raise ValueError("messages is empty")
        return self


@dataclass(slots=True)
class Job:
    """One line of the file: its number, its request if it has one, and the row that answers it."""

    number: int
    row: dict[str, Any]
    request: Request | None = None

    @property
    def done(self) -> bool:
        return "text" in self.row or "error" in self.row


@dataclass(frozen=True, slots=True)
class How:
    """The command's own: what a line does not say."""

    system: str
    raw: bool
    sampling: Sampling
    context: int


def read_lines(path: str) -> list[tuple[int, bytes]]:
    """Numbered lines that are not blank. OptimError (2) for a file that cannot be read."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        what = f"cannot read {path}: {reason}"
        raise OptimError(what, 'give a file of lines like {"prompt": "Hi"}', USAGE) from None
    lines = [(n, line) for n, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    if not lines:
        raise OptimError(f"{path} has no lines", 'give lines like {"prompt": "Hi"}', USAGE)
    return lines


def prepare(number: int, data: bytes, model: Model, how: How) -> Job:
    """The job of one line; what is wrong with it becomes its row's `error`."""
    job = Job(number, {"line": number})
    try:
        line = _parse(data)
        if line.id is not None:
            job.row["id"] = line.id
        job.request = _request(line, model, how)
    except OptimError as error:
        job.row["error"] = error.message
    return job


def _parse(data: bytes) -> Line:
    text = decode(data, "the line")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptimError(f"not JSON: {error}", code=USAGE) from None
    try:
        return Line.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise OptimError(f"{place + ': ' if place else ''}{first['msg']}", code=USAGE) from None


def _request(line: Line, model: Model, how: How) -> Request:
    from optim.runtime.engine.sequence import Request, check

    given = {name: getattr(line, name) for name in PARAMETERS}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if line.stop is not None:
        changes["stop"] = tuple(line.stop)
    sampling = replace(how.sampling, **changes)
    exact = line.prompt is not None and how.raw
    request = Request(_ids(line, model, how), sampling, exact)
    check(request, model, how.context)
    return request


def _ids(line: Line, model: Model, how: How) -> list[int]:
    tokenizer = model.tokenizer
    system = how.system if line.system is None else line.system
    if line.prompt is not None and (how.raw or not tokenizer.has_chat_template):
        if system:
            raise OptimError("a prompt that is continued has no place for a system prompt")
        return tokenizer.encode(line.prompt, special=True)
    if line.prompt is not None:
        messages = [{"role": "user", "content": line.prompt}]
    else:
        messages = [message.model_dump() for message in line.messages or ()]
    if not tokenizer.has_chat_template:
        raise OptimError("a model without a chat template takes a prompt, no messages")
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    return tokenizer.chat(messages)


@contextmanager
def _output(path: str | None) -> Iterator[TextIO]:
    """Standard output, or a new file at `path`. OptimError (2) if there is one already."""
    if path is None:
        yield sys.stdout
        return
    try:
        with Path(path).open("x", encoding="utf-8") as file:
            yield file
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptimError(f"cannot write {path}: {reason}", "choose another name", USAGE) from None


def run_batch(
    model: Model,
    lines: list[tuple[int, bytes]],
    how: How,
    output: str | None,
    size: int,
    policy: Any,
) -> int:
    """Answer `lines`, `size` at once; rows go out as soon as all before them are there.

    Returns the exit code: 1 if any line could not be answered, 130 if Ctrl-C stopped it.
    """
    from optim.runtime.engine.scheduler import answer_all

    jobs = [prepare(number, data, model, how) for number, data in lines]
    for job in jobs:
        if "error" in job.row:
            ui.note(f"line {job.number}: {job.row['error']}", style="red")
    asked = [(job, job.request) for job in jobs if job.request is not None]
    requests = [request for _, request in asked]
    waiting = iter(jobs)
    with _output(output) as out, ui.progress("batch") as step:
        try:
            head = _write(out, waiting, next(waiting, None))
            step(0, len(asked), f"{len(asked)} prompts")
            answers = answer_all(model, requests, context=how.context, size=size, policy=policy)
            for done, (place, answer) in enumerate(answers, 1):
                asked[place][0].row.update(_row(answer, requests[place]))
                head = _write(out, waiting, head)
                step(done, len(asked), "")
        except KeyboardInterrupt:
            return 130
    return int(len(asked) < len(jobs))


def _row(answer: Any, request: Request) -> dict[str, Any]:
    return {
        "text": answer.text,
        "stop_reason": answer.stop_reason,
        "prompt_tokens": len(request.ids),
        "tokens": answer.tokens,
    }


def _write(out: TextIO, waiting: Iterator[Job], head: Job | None) -> Job | None:
    """Write the rows that are next in order and done; returns the first that is not."""
    while head is not None and head.done:
        out.write(json.dumps(head.row, ensure_ascii=False) + "\n")
        head = next(waiting, None)
    out.flush()
    return head
