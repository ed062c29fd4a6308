"""The conversation at a real terminal, typed at by pexpect."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

PROGRAM = Path(__file__).with_name("repl_program.py")
CTRL_C, CTRL_D, ALT_ENTER, TAB = "\x03", "\x04", "\x1b\r", "\t"


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[pexpect.spawn[str]]:
    state = {"XDG_STATE_HOME": str(tmp_path / "state"), "PROMPT_TOOLKIT_NO_CPR": "1"}
    child = pexpect.spawn(
        sys.executable,
        [str(PROGRAM)],
        env={**os.environ, **state, "TERM": "xterm"},
        cwd=tmp_path,
        encoding="utf-8",
        timeout=30,
        dimensions=(30, 100),
    )
    child.expect("slow · none · cpu · greedy · /help, Ctrl-C stops a reply, Ctrl-D leaves")
    child.expect(">>>")
    yield child
    child.close(force=True)


def leave(child: pexpect.spawn[str]) -> None:
    child.send(CTRL_D)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_ctrl_c_stops_the_reply_and_keeps_it(terminal: pexpect.spawn[str], tmp_path: Path) -> None:
    terminal.sendline("count")
    terminal.expect("0 1 2 ")
    terminal.send(CTRL_C)
    terminal.expect(r"\[\d+ tokens · \d+ tok/s · prompt 1 · stopped\]")
    terminal.expect(">>>")
    terminal.sendline("/save chat.json")
    terminal.expect(r"saved chat.json \(2 messages\)")
    terminal.expect(">>>")
    question, reply = json.loads((tmp_path / "chat.json").read_text())["messages"]
    assert question["content"] == "count"
    numbers = reply["content"].split()
    assert 3 <= len(numbers) < 400
    assert numbers == [str(number) for number in range(len(numbers))]

    terminal.sendline("/clear")
    terminal.expect(">>>")
    terminal.sendline("/load chat.json")
    terminal.expect(r"loaded chat.json \(2 messages\)")
    terminal.expect(">>>")
    terminal.sendline("/undo")
    terminal.expect("taken back: count")
    terminal.expect(">>>")
    leave(terminal)


def test_ctrl_c_at_the_prompt_says_how_to_leave(terminal: pexpect.spawn[str]) -> None:
    terminal.send(CTRL_C)
    terminal.expect("Ctrl-D or /quit leaves")
    terminal.expect(">>>")
    leave(terminal)


def test_many_lines(terminal: pexpect.spawn[str], tmp_path: Path) -> None:
    terminal.send("echo one" + ALT_ENTER + "two\r")
    terminal.expect("one\r\ntwo\r\n")
    terminal.expect(">>>")
    terminal.send('"""echo three\r')
    terminal.send('four"""\r')
    terminal.expect("three\r\nfour\r\n")
    terminal.expect(">>>")
    terminal.send("\x1b[200~echo five\nsix\x1b[201~\r")
    terminal.expect("five\r\nsix\r\n")
    terminal.expect(">>>")
    terminal.sendline("/save all.json")
    terminal.expect("saved")
    terminal.expect(">>>")
    leave(terminal)
    messages = json.loads((tmp_path / "all.json").read_text())["messages"]
    assert [m["content"] for m in messages if m["role"] == "user"] == [
        "echo one\ntwo",
        "echo three\nfour",
        "echo five\nsix",
    ]


def test_completion_and_history(terminal: pexpect.spawn[str], tmp_path: Path) -> None:
    terminal.send("/und" + TAB)
    terminal.expect("o")
    terminal.send("\r")
    terminal.expect("there is no question yet")
    terminal.expect(">>>")
    terminal.sendline("/quit")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
    history = tmp_path / "state" / "optim" / "history"
    assert "+/undo" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0
