"""Replies at a terminal: lines end between words, while characters are shown as they come."""

import shutil
from typing import TextIO

from rich.cells import cell_len

from optim.cli.conversation.markdown import FENCE, Styles

BACK = "\x1b[{}D\x1b[K"  # to the left by so many columns, and wipe what stands there


class Wrapped:
    """Writes text to a terminal in pieces of any size.

    A word that turns out not to fit its line is wiped and written on the next one. A word longer
    than half a line is cut, text of wide characters (as Chinese) breaks anywhere, and code between
    fences is left to the terminal.
    """

    def __init__(self, out: TextIO, styles: Styles | None = None) -> None:
        """With `styles`, characters are drawn in them."""
        self._out, self._styles = out, styles
        self._code = False
        self.new_line()

    def new_line(self) -> None:
        """What comes next begins a line."""
        self._line = self._word = ""
        self._column = 0

    def write(self, piece: str) -> None:
        """Show a piece of the text."""
        width = shutil.get_terminal_size().columns - 1  # the last column makes terminals wait
        self._out.write("".join(self._shown(character, width) for character in piece))

    def _shown(self, character: str, width: int) -> str:
        if character == "\n":
            self._code ^= self._line.lstrip().startswith(FENCE)
            self.new_line()
            return self._drawn(character)
        before, cells = "", cell_len(character)
        self._line += character
        if self._column + cells > width and not self._code:
            if character.isspace():  # the next word begins a line, and shows that
                self._word = ""
                return self._drawn(character)[:-1]
            before = self._break(width)
        self._column += cells
        self._word = "" if character.isspace() or cells > 1 else self._word + character
        return before + self._drawn(character)

    def _drawn(self, character: str) -> str:
        return character if self._styles is None else self._styles.take(character)

    def end(self) -> None:
        """What comes next is no part of the text."""
        if self._styles is not None:
            self._out.write(self._styles.end())

    def _break(self, width: int) -> str:
        """End the line, before the word at hand if it is short."""
        cells = cell_len(self._word)
        moved = self._word if cells <= width // 2 else ""
        self._column = cell_len(moved)
        return (BACK.format(cells) if moved else "") + "\n" + moved
