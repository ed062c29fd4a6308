"""Run the commands that a document shows: `python docs/run_tour.py docs/tour.md`.

In a block fenced with ```console a line `$ command` is run, a trailing backslash continues it, the
lines below it are what it prints, and a line `exit N` is its exit code (0 when there is none). Each
line shown must be found in what was printed, in order; `…` in it stands for anything. The blocks of
a document that are fenced with ```python are one program, which is run after the commands.
Everything runs in one temporary folder, with this Python's programs first on the path.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

LIMIT = 900  # seconds a command may take


@dataclass
class Step:
    """A command of the document, with what is said of it."""

    line: int
    command: str
    shown: list[str] = field(default_factory=list)
    code: int = 0


def steps(text: str) -> list[Step]:
    """The commands of a document, in order."""
    found: list[Step] = []
    inside = continued = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            inside = line.strip() == "```console"
        elif inside and continued:
            found[-1].command += "\n" + line
        elif inside and line.startswith("$ "):
            found.append(Step(number, line[2:]))
        elif inside and found and (stated := re.fullmatch(r"exit (\d+)", line)):
            found[-1].code = int(stated[1])
        elif inside and found and line.strip():
            found[-1].shown.append(line)
        continued = inside and line.endswith("\\")
    return found


def program(text: str) -> list[Step]:
    """The ```python blocks of a document as one step; nothing if there are none."""
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    source = "\n".join(blocks)
    return [Step(1, f"python - <<'PROGRAM'\n{source}PROGRAM")] if blocks else []


def missing(shown: list[str], printed: str) -> str | None:
    """The first line shown that was not printed after the one before it."""
    lines = iter(printed.splitlines())
    for line in shown:
        pattern = ".*".join(map(re.escape, line.strip().split("…")))
        if not any(re.search(pattern, found) for found in lines):
            return line
    return None


def run(step: Step, folder: str) -> str | None:
    """Run one command; returns what is wrong, if anything."""
    programs = os.path.dirname(os.path.abspath(sys.executable))
    path = programs + os.pathsep + os.environ.get("PATH", "")
    try:
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", step.command],
            cwd=folder,
            env={**os.environ, "PATH": path, "COLUMNS": "100", "NO_COLOR": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        return f"took more than {LIMIT} s"
    printed = done.stdout.decode(errors="replace")
    print(printed, end="", flush=True)
    if done.returncode != step.code:
        return f"exit code {done.returncode}, the document says {step.code}"
    line = missing(step.shown, printed)
    return None if line is None else f"not printed: {line}"


def main(documents: list[str]) -> int:
    """Run every command of the documents; returns 1 at the first that does not hold."""
    for document in documents:
        text = Path(document).read_text(encoding="utf-8")
        todo = [*steps(text), *program(text)]
        if not todo:
            print(f"{document}: no command found", file=sys.stderr)
            return 1
        with tempfile.TemporaryDirectory(prefix="optim-tour-") as folder:
            for step in todo:
                print(f"$ {step.command}", flush=True)
                start = time.monotonic()
                wrong = run(step, folder)
                if wrong:
                    print(f"{document}:{step.line}: {wrong}", file=sys.stderr)
                    return 1
                print(f"({time.monotonic() - start:.1f} s)\n", flush=True)
        print(f"{document}: {len(todo)} commands ran as stated")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
