"""A question of the conversation: stream the reply, keep what came.

Replies go to standard output, everything else to standard error. The first Ctrl-C during a reply
asks it to stop after the token at hand, so that the cache and the text agree; what came so far is
kept. A second one does not wait.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from optim.cli import ui
from optim.cli.conversation.markdown import styles
from optim.cli.conversation.wrap import Wrapped

if TYPE_CHECKING:
    from optim.runtime.engine.session import Reading, Session, Stats

    Start = Callable[[Reading], Generator[str, None, None]]

NEW_LINE = "\n"
LOOP = (
    "the reply repeats itself: Ctrl-C stops it; a temperature above 0, or a repetition penalty"
    " of 1.1, breaks such loops"
)


@dataclass(slots=True)
class Chat:
    """A conversation, and what the slash commands may change about how it goes on."""

    session: Session
    show_stats: bool = False
    markdown: bool = True
    file: Path | None = None
    done: bool = False


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a question that the loop asks; the second raises as usual."""
    asked = False

    def ask(_signal: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def stream(session: Session, start: Start, out: TextIO, markdown: bool = True) -> bool:
    """Write the pieces of a reply as they come; returns whether Ctrl-C stopped it.

    It stops after the token at hand, or between two chunks of a prompt that is still read.
    """
    at_terminal, told = out.isatty(), False
    shown = Wrapped(out, styles(out) if markdown else None)
    with stoppable() as stopped:
        pieces = start(partial(_reading, stopped))
        try:
            for piece in pieces:
                ui.status()
                if at_terminal:
                    shown.write(ui.plain(piece))
                else:
                    out.write(piece)
                out.flush()
                if stopped():
                    break
                if session.stats.repeats and not told:
                    shown.end()
                    ui.note(f"{NEW_LINE * at_terminal}{LOOP}")
                    shown.new_line()
                    told = True
        except KeyboardInterrupt:
            return True
        finally:
            ui.status()
            shown.end()
            pieces.close()
    return stopped()


def _reading(stopped: Callable[[], bool], done: int, total: int) -> None:
    if stopped():
        raise KeyboardInterrupt
    ui.status(f"reading {done}/{total}")


def describe(stats: Stats, stopped: bool) -> str:
    """One line on a reply: `[37 tokens · 318 tok/s · prompt 14 · stopped]`."""
    parts = [f"{stats.new_tokens} token{'s' * (stats.new_tokens != 1)}"]
    rate = stats.decode_rate
    parts += [f"{rate:.{int(rate < 10)}f} tok/s"] if rate else []
    parts += [f"prompt {stats.prompt_tokens}"]
    if stats.drafted_tokens:
        parts += [f"{stats.accepted_tokens} of {stats.drafted_tokens} guesses right"]
    why = {"length": "reached max_tokens", "context": "the context is full"}
    end = "stopped" if stopped else why.get(stats.stop_reason, "")
    return f"[{' · '.join([*parts, end] if end else parts)}]"


def cut(session: Session) -> str | None:
    """Why the last reply is not whole, and what to do; None if it is."""
    stats = session.stats
    if stats.stop_reason == "length":
        return f"the answer was cut after {stats.new_tokens} tokens: --max-tokens allows no more"
    if stats.stop_reason == "context":
        limit = session.limit
        return f"the answer was cut, the context of {limit} tokens is full: " + (
            session.model.more_room(limit).replace("it", "the prompt", 1)
        )
    return None


def answer(chat: Chat, text: str) -> None:
    """Ask `text` and stream the reply."""
    session = chat.session
    asked = len(session.messages)
    stopped = stream(session, partial(session.reply, text), sys.stdout, chat.markdown)
    ui.say("")
    stats = session.stats
    if stopped and len(session.messages) == asked:
        ui.note("stopped before the question was read; it is not part of the conversation")
    elif stopped or chat.show_stats or stats.stop_reason in ("length", "context"):
        ui.note(describe(stats, stopped))
