"""Chat templates: where a model folder keeps its own, and how it is rendered.

A template is a jinja program that came with the model: it runs in jinja's sandbox, in a process
whose time and memory are bounded (template_worker.py). The process is started at the first chat,
or by `begin`, and answers all that follow.
"""

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.system.files import load_json
from optim.runtime.text import template_worker

Message = dict[str, str]
PATIENCE = 30.0  # seconds on the clock: a machine may have other work than the worker's
LONGEST_TEMPLATE = 4 << 20
FIX = "check the roles and their order; some models take no system message"
HARM = "the template came with the model: `--raw` runs the model without it"


def chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The default chat template, from any of the places where it is kept."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read(path)
    kept = settings.get("chat_template")
    if kept is None and (folder / "chat_template.json").is_file():
        kept = load_json(folder / "chat_template.json").get("chat_template")
    if isinstance(kept, list):
        kept = _named(kept).get("default")
    return kept if isinstance(kept, str) else None


def other_templates(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """The chat templates beside the default one, by name: `tool_use`, `rag`."""
    files = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    found = {path.stem: _read(path) for path in files}
    kept = settings.get("chat_template")
    found = (_named(kept) if isinstance(kept, list) else {}) | found
    return {name: template for name, template in found.items() if name != "default"}


def _named(kept: list[Any]) -> dict[str, str]:
    """Those of a list in tokenizer_config.json; what is no template is passed over."""
    pairs = [(item.get("name"), item.get("template")) for item in kept if isinstance(item, dict)]
    return {n: t for n, t in pairs if isinstance(n, str) and isinstance(t, str)}


def _read(path: Path) -> str:
    fix = "fetch the model again, or remove the file"
    try:
        if path.stat().st_size > LONGEST_TEMPLATE:
            raise OptimError(f"{path} is no chat template: it is too large", fix, USAGE)
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise OptimError(f"{path} cannot be read: {error}", fix, USAGE) from None


class _Worker:
    """The process, and one exchange with it at a time."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", template_worker.__file__, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us, not for it
        )

    def ask(self, request: bytes) -> dict[str, str] | None:
        """The reply; None if the process did not live to give it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request + b"\n")
            self._process.stdin.flush()
        except OSError:
            return None
        line = self._line()
        return json.loads(line) if line.endswith(b"\n") else None

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        pipe, found, end = self._process.stdout.fileno(), bytearray(), time.monotonic() + PATIENCE
        while not found.endswith(b"\n"):
            if not select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
                break
            piece = os.read(pipe, 1 << 16)
            if not piece:
                break
            found += piece
        return bytes(found)

    def end(self) -> None:
        """Stop the process. A child of a fork leaves it to the parent."""
        if self.owner == os.getpid():
            self._process.kill()
            self._process.communicate()


_lock = threading.Lock()
_workers: list[_Worker] = []  # one, once it has been started


def _end() -> None:
    while _workers:
        _workers.pop().end()


atexit.register(_end)


def begin() -> None:
    """Start the process, which takes a moment, before it is needed."""
    with _lock:
        _worker()


def _worker() -> _Worker:
    if _workers and _workers[0].owner != os.getpid():
        _workers.clear()
    if not _workers:
        _workers.append(_Worker())
    return _workers[0]


def _ask(request: bytes) -> dict[str, str] | None:
    with _lock:
        worker = _worker()
        try:
            reply = worker.ask(request)
        except BaseException:  # Ctrl-C: the reply that is still to come belongs to nobody
            _end()
            raise
        if reply is None:
            _end()
        return reply


def system_folded(messages: Sequence[Message]) -> list[Message]:
    """The chat without a system message: its text stands before that of the first user turn."""
    system = [m["content"] for m in messages if m["role"] == "system"]
    rest = [dict(m) for m in messages if m["role"] != "system"]
    first = next((m for m in rest if m["role"] == "user"), None)
    if first is not None:
        first["content"] = "\n\n".join([*system, first["content"]])
    return rest


def render_template(template: str, messages: Sequence[Message], variables: dict[str, Any]) -> str:
    """The chat as the template writes it.

    Raises OptimError (2) if the template refuses the chat, or takes too much time or memory.
    """
    known = {"tools": None, "documents": None, **variables, "messages": list(messages)}
    reply = _ask(json.dumps({"template": template, "variables": known}).encode())
    if reply is None:
        limit = f"{template_worker.SECONDS} s or {template_worker.MEMORY >> 20} MB"
        raise OptimError(f"the chat template takes more than {limit}", HARM, USAGE)
    if "error" in reply:
        raise OptimError(f"the chat template refuses this chat: {reply['error']}", FIX, USAGE)
    return reply["text"]
