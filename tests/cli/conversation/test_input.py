"""Messages from plain lines: blocks of three quotes, bad UTF-8, the end of input."""

import pytest

from optim.cli.conversation.input import decode, is_open, plain, unquote
from optim.recipes.errors import OptimError


def messages(data: bytes) -> list[str]:
    read = plain(data.splitlines(keepends=True))
    found = []
    while True:
        try:
            found.append(read())
        except EOFError:
            return found


def test_one_message_a_line() -> None:
    assert messages(b"hello\n\n  /help \nbye") == ["hello", "", "/help", "bye"]


def test_three_quotes_hold_many_lines() -> None:
    assert messages(b'"""one\n\n  two\n"""\nthree\n') == ["one\n\n  two", "three"]
    assert messages(b'"""all on one line"""\n') == ["all on one line"]


def test_quotes_left_open_end_with_the_input() -> None:
    assert messages(b'"""one\ntwo\n') == ["one\ntwo"]


@pytest.mark.parametrize(
    ("text", "state"),
    [
        *(("", False), ('a """', False), ('""""""', False), ('"""a"""', False)),
        *(('"""', True), ('""""', True), ('"""a', True), ('  """a\nb', True)),
    ],
)
def test_is_open(text: str, state: bool) -> None:
    assert is_open(text) is state


def test_unquote_keeps_other_quotes() -> None:
    assert unquote('say "hi"') == 'say "hi"'
    assert unquote('"""say "hi" """') == 'say "hi"'


def test_bytes_that_are_not_utf8_are_located() -> None:
    with pytest.raises(OptimError) as caught:
        decode(b"caf\xe9 au lait", "standard input")
    assert caught.value.code == 2
    assert "byte 0xe9 at position 3" in caught.value.message


def test_a_byte_order_mark_is_dropped() -> None:
    assert decode(b"\xef\xbb\xbfhi", "x") == "hi"
