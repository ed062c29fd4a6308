"""Word wrap of streamed text, on a terminal of a few lines of Python."""

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optim.cli.conversation.wrap import Wrapped

WIDTH = 20


def screen(pieces: list[str]) -> list[str]:
    """The lines that a terminal shows."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(WIDTH + 1))
        wrapped = Wrapped(out)
        for piece in pieces:
            wrapped.write(piece)
    lines = [""]
    for part in re.findall(r"\x1b\[\d+D\x1b\[K|\n|[^\x1b\n]", out.getvalue()):
        if part == "\n":
            lines.append("")
        elif part.startswith("\x1b"):
            lines[-1] = lines[-1][: -int(re.findall(r"\d+", part)[0])]
        else:
            lines[-1] += part
    return lines


words = st.text("abc", min_size=1, max_size=WIDTH // 2)


@given(st.lists(words, max_size=30), st.integers(1, 7))
def test_lines_end_between_words(said: list[str], size: int) -> None:
    text = " ".join(said)
    lines = screen([text[i : i + size] for i in range(0, len(text), size)])
    assert all(len(line) <= WIDTH for line in lines)
    assert [word for line in lines for word in line.split()] == said


@given(st.text("ab \n", max_size=200))
def test_nothing_is_lost(text: str) -> None:
    lines = screen([text])
    assert all(len(line) <= WIDTH for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_long_words_and_wide_characters_are_cut() -> None:
    assert screen(["x" * 45]) == ["x" * 20, "x" * 20, "x" * 5]
    assert screen(["中" * 12]) == ["中" * 10, "中" * 2]


def test_code_is_left_to_the_terminal() -> None:
    code = "print('one two three four five six')"
    assert screen([f"```\n{code}\n```\nand then words that go on"]) == [
        "```",
        code,
        "```",
        "and then words that ",
        "go on",
    ]
