"""Type commands at a real terminal and write down what it shows: `python docs/record_session.py`.

It prints docs/session.md. The commands run in an empty folder; lines that a program wiped again (a
progress bar, a status) are kept as last seen. It takes some minutes on two cores.
"""

import os
import re
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import pexpect

LINES, COLUMNS = 40, 100
SHELL = "$ "
STEERING = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\x1b\][^\x07]*\x07")
QUANTIZE = "optim quantize demo --num-samples 4 --seq-len 128"
HEAD = """# A recorded session

What a terminal of {columns} columns showed on {day}: {cpu}, {cores} cores.
`python docs/record_session.py > docs/session.md` types the same commands again.
`^C` and `^D` are the keys. Of a progress bar, every eighth state is kept.

```text
"""


def cpu() -> str:
    """The processor's name."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else "an unnamed CPU"


def shown(raw: str) -> list[str]:
    """Lines as they were read at the terminal: the states of a line that was redrawn, thinned."""
    lines: list[str] = []
    for line in raw.replace("\r\n", "\n").split("\n"):
        states = [STEERING.sub("", state).rstrip() for state in re.split(r"\r|\x1b\[2K", line)]
        seen = list(dict.fromkeys(state for state in states if state))
        lines += [*seen[:-1:8], *seen[-1:]]
    return lines


class Terminal:
    """A shell at a pseudo-terminal, and what it has shown so far."""

    def __init__(self, folder: str) -> None:
        own = {"PS1": SHELL, "TERM": "xterm", "XDG_STATE_HOME": folder + "/.state"}
        self.shell = pexpect.spawn(
            "bash",
            ["--norc", "--noprofile", "--noediting"],
            env=os.environ | own | {"PROMPT_TOOLKIT_NO_CPR": "1"},
            cwd=folder,
            encoding="utf-8",
            timeout=1200,
            dimensions=(LINES, COLUMNS),
        )
        self.shell.expect_exact(SHELL)
        self.lines: list[str] = []

    def type(self, command: str) -> None:
        """Run a command of the shell to its end."""
        self.shell.sendline(command)
        self.shell.expect_exact(SHELL)
        self.lines += [SHELL + command, *shown(self.shell.before)[1:], ""]

    def chat(self, command: str) -> None:
        """Talk: Ctrl-C while a long prompt is read, Ctrl-C while a reply is written, Ctrl-D."""
        shell = self.shell
        shell.sendline(command)
        shell.expect_exact(">>>")
        self.lines += [SHELL + command, *shown(shell.before)[1:]]
        long = "Say these words again: " + "the harbour lay still " * 1000
        shell.send(f"\x1b[200~{long}\x1b[201~\r")
        shell.expect(r"reading \d+/\d+")
        reading = shell.match[0]
        shell.send("\x03")
        shell.expect(r"stopped before [^\r\n]*")
        self.lines += [">>> Say these words again: the harbour lay still … (4,000 words, pasted)"]
        self.lines += [f"{reading} ^C", shell.match[0]]
        shell.expect_exact(">>>")
        time.sleep(1)
        shell.send("Tell me a long story about the sea.\r")
        shell.expect(r"Tell me a long story about the sea\.[^\n]*\n")
        time.sleep(2.5)
        shell.send("\x03")
        shell.expect(r"\[\d+ tokens[^\r\n]*")
        self.lines += [">>> Tell me a long story about the sea."]
        self.lines += [*shown(shell.before)[:-1], "^C", shell.match[0]]
        shell.expect_exact(">>>")
        time.sleep(1)
        shell.send("\x04")
        shell.expect_exact(SHELL)
        self.lines += [">>> ^D", ""]


def main() -> int:
    """Print the page."""
    with tempfile.TemporaryDirectory(prefix="optim-session-") as folder:
        terminal = Terminal(folder)
        terminal.type(f"{QUANTIZE} -o small")
        terminal.type('optim run small "What is the capital of France?" --temperature 0')
        terminal.chat("optim run small")
        terminal.type(f"{QUANTIZE} -o small")
        terminal.type("mkdir thesis; echo years of work > thesis/chapter1.txt")
        terminal.type(f"{QUANTIZE} -o thesis --force")
        terminal.type("optim prune small -o small --force")
        terminal.type("ls thesis small")
    text = "\n".join(terminal.lines).rstrip()
    head = HEAD.format(columns=COLUMNS, day=date.today(), cpu=cpu(), cores=os.cpu_count())
    print(f"{head}{text}\n```")
    return 0


if __name__ == "__main__":
    sys.exit(main())
