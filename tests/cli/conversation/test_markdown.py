"""Markdown at a terminal: the text stays, and what marks say is drawn."""

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optim.cli.conversation.markdown import CODE, PLAIN, STRONG, Styles, styles
from optim.cli.conversation.wrap import Wrapped

SWITCH = re.compile(r"\x1b\[[0-9;]*m")
marked = st.text("ab *`#\n-", max_size=60)


def drawn(text: str) -> str:
    made = Styles()
    return "".join(map(made.take, text)) + made.end()


def in_style(text: str, style: str) -> str:
    """The characters that are drawn in a style."""
    found, now = "", PLAIN
    for part in re.split(r"(\x1b\[[0-9;]*m)", drawn(text)):
        now = part if SWITCH.fullmatch(part) else now
        found += "" if SWITCH.fullmatch(part) or now != style else part
    return found


@given(marked)
def test_no_character_is_lost_and_the_end_is_plain(text: str) -> None:
    shown = drawn(text)
    assert SWITCH.sub("", shown) == text
    assert (SWITCH.findall(shown) or [PLAIN])[-1] == PLAIN


@pytest.mark.parametrize(
    ("text", "strong", "code"),
    [
        ("a **bold** word", "bold**", ""),
        ("2 ** 3 ** 4", "", ""),
        ("# Head\nbody", " Head", ""),
        ("#no head", "", ""),
        ("use `x**2` here", "", "`x**2`"),
        ("**a\nb**", "a", ""),
        ("```py\n# no head\n```\nafter **b**", "b**", "```py# no head```"),
    ],
)
def test_what_is_drawn_how(text: str, strong: str, code: str) -> None:
    assert (in_style(text, STRONG), in_style(text, CODE)) == (strong, code)


@given(marked, st.integers(8, 20))
def test_lines_break_where_they_break_without(text: str, width: int) -> None:
    outs = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        for out, made in zip(outs, (None, Styles()), strict=True):
            shown = Wrapped(out, made)
            shown.write(text)
            shown.end()
    assert SWITCH.sub("", outs[1].getvalue()) == outs[0].getvalue()


def test_only_a_terminal_that_wants_them_has_styles(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert styles(Terminal()) is not None and styles(io.StringIO()) is None
    monkeypatch.setenv("NO_COLOR", "1")
    assert styles(Terminal()) is None
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert styles(Terminal()) is None
