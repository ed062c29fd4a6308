"""Where a conversation's lines come from: an editor at a terminal, plain lines from a pipe.

Both give one message a call and raise `EOFError` at the end. A message that opens with three double
quotes runs on until they close; at a terminal Alt-Enter makes a new line too, and pasted text keeps
its lines.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from optim.cli import ui
from optim.recipes.errors import USAGE, OptimError

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

Reader = Callable[[], str]
QUOTES = '"""'
PROMPT = ">>> "


def is_open(text: str) -> bool:
    """Whether a message opens with three quotes that have not been closed yet."""
    text = text.strip()
    return text.startswith(QUOTES) and (len(text) < 6 or not text.endswith(QUOTES))


def unquote(text: str) -> str:
    """The message inside three quotes, or the message as it is, without space around it."""
    text = text.strip()
    if text.startswith(QUOTES):
        text = text[3:].removesuffix(QUOTES)
    return text.strip()


def decode(data: bytes, name: str) -> str:
    """Bytes as UTF-8 text; raises OptimError code 2 that names the first byte which is not."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OptimError(
            f"{name} is not UTF-8 text: byte 0x{data[error.start]:02x} at position {error.start}",
            fix="convert it first, for example: iconv -f latin1 -t utf-8 FILE",
            code=USAGE,
        ) from None


def plain(stream: Iterable[bytes]) -> Reader:
    """Read messages from a stream of lines, one a line or one a block of three quotes."""
    lines = iter(stream)

    def read() -> str:
        text = _next(lines)
        while is_open(text):
            try:
                text += _next(lines)
            except EOFError:
                break
        return unquote(text)

    return read


def _next(lines: Iterator[bytes]) -> str:
    for line in lines:
        return decode(line, "standard input")
    raise EOFError


def editor(complete: Callable[[str], list[str]]) -> Reader:
    """An editing prompt with history; `complete` gives the endings of the line typed so far."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.output import create_output

    class Endings(Completer):
        def get_completions(self, document: Document, _event: object) -> Iterator[Completion]:
            typed = document.text_before_cursor
            first, space, rest = typed.partition(" ")
            word = rest if space else first
            return (Completion(text, -len(word)) for text in complete(typed))

    session: PromptSession[str] = PromptSession(
        PROMPT,
        multiline=True,
        prompt_continuation="... ",
        history=_history(),
        completer=Endings(),
        complete_while_typing=False,
        key_bindings=_keys(),
        output=create_output(always_prefer_tty=True),
    )
    return lambda: unquote(session.prompt())


def _keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    return keys


def _history() -> History:
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = state_folder() / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        return FileHistory(path)
    except OSError as error:
        ui.note(f"no history is kept: {path}: {error.strerror}")
        return InMemoryHistory()


def state_folder() -> Path:
    """The XDG state folder of `optim`."""
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".local" / "state") / "optim"
