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
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from optim.cli import ui

if TYPE_CHECKING:
    from optim.runtime.engine import Session, Stats


@dataclass(slots=True)
class Chat:
    """A conversation, and what the slash commands may change about how it goes on."""

    session: Session
    show_stats: bool = False
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


def stream(pieces: Generator[str, None, None], out: TextIO) -> bool:
    """Write the pieces of a reply as they come; returns whether Ctrl-C stopped it."""
    at_terminal = out.isatty()
    with stoppable() as stopped:
        try:
            for piece in pieces:
                out.write(ui.plain(piece) if at_terminal else piece)
                out.flush()
                if stopped():
                    break
        except KeyboardInterrupt:
            return True
        finally:
            pieces.close()
    return stopped()


def describe(stats: Stats, stopped: bool) -> str:
    """One line on a reply: `[37 tokens · 318 tok/s · prompt 14 · stopped]`."""
    parts = [f"{stats.new_tokens} token{'s' * (stats.new_tokens != 1)}"]
    rate = stats.decode_rate
    parts += [f"{rate:.{int(rate < 10)}f} tok/s"] if rate else []
    parts += [f"prompt {stats.prompt_tokens}"]
    why = {"length": "reached max_tokens", "context": "the context is full"}
    end = "stopped" if stopped else why.get(stats.stop_reason, "")
    return f"[{' · '.join([*parts, end] if end else parts)}]"


def answer(chat: Chat, text: str) -> None:
    """Ask `text` and stream the reply."""
    stopped = stream(chat.session.reply(text), sys.stdout)
    ui.say("")
    stats = chat.session.stats
    if stopped or chat.show_stats or stats.stop_reason in ("length", "context"):
        ui.note(describe(stats, stopped))
