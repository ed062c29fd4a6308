"""Markdown of a reply at a terminal: its marks stay, and what they mark is bold or coloured.

Styles are switched between characters as these come, so nothing that was shown is drawn again.
Known are headings, **strong** words, `code`, and code between fences.
"""

import os
from typing import TextIO

PLAIN, STRONG, CODE = "\x1b[0m", "\x1b[0;1m", "\x1b[0;36m"
FENCE = "```"


class Styles:
    """The style of each character, given one after the other."""

    def __init__(self) -> None:
        self._shown, self._fenced = PLAIN, False
        self._new_line()

    def _new_line(self) -> None:
        """Marks of the line before end with it."""
        self._line = ""
        self._strong = self._code = self._marked = False

    def take(self, character: str) -> str:
        """`character`, behind what switches to its style."""
        style = self._style(character)
        switch = "" if style == self._shown else style
        self._shown = style
        return switch + character

    def end(self) -> str:
        """What ends the style at hand."""
        switch = "" if self._shown == PLAIN else PLAIN
        self._shown = PLAIN
        return switch

    def _style(self, character: str) -> str:
        if character == "\n":
            self._fenced ^= self._line.lstrip().startswith(FENCE)
            self._new_line()
            return PLAIN
        before = self._line
        self._line += character
        if self._fenced or self._line.lstrip().startswith(FENCE):
            return CODE
        if character == "`":
            self._code = not self._code
            return CODE
        if self._code:
            return CODE
        strong = self._is_strong(before, character)
        return STRONG if strong or _heads(self._line) else PLAIN

    def _is_strong(self, before: str, character: str) -> bool:
        """Whether this character is; `**` opens in front of a word and closes behind one."""
        if self._marked and not character.isspace() and character != "*":
            self._strong = True
        self._marked = False
        strong = self._strong
        if character == "*" and before.endswith("*"):
            if not strong:
                self._marked = True
            elif not before[-2:-1].isspace():
                self._strong = False
        return strong


def styles(out: TextIO) -> Styles | None:
    """Styles for `out`; None where none are wanted: no terminal, a dumb one, NO_COLOR."""
    refused = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return Styles() if out.isatty() and not refused else None


def _heads(line: str) -> bool:
    marks, space, _ = line.partition(" ")
    return bool(space) and 1 <= len(marks) <= 6 and set(marks) == {"#"}
