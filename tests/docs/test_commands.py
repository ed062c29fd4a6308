"""Every `optim …` written in the documents is a command line that the program understands."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from optim.cli.app import program

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def command_lines(text: str) -> list[list[str]]:
    """The arguments of each `optim …` in inline code and behind a `$` of a fenced block."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    typed = re.findall(r"^\$ (.*(?:(?<=\\)\n.*)*)", text, flags=re.M)
    found = []
    for line in [*re.findall(r"`([^`\n]+)`", prose), *typed]:
        for part in pipeline(line.replace("\\\n", " ")):
            if part[0] == "optim":
                found.append(part[1:])
    return found


def pipeline(line: str) -> list[list[str]]:
    """A shell line cut at its pipes, semicolons and ampersands, without what redirects."""
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    words.commenters = ""
    parts: list[list[str]] = [[]]
    skip = False
    for word in words:
        if set(word) <= set("|;&"):
            parts.append([])
        elif set(word) <= set("<>"):
            skip = True
        elif skip:
            skip = False
        else:
            parts[-1].append(word)
    return [part for part in parts if part]


def parse(arguments: list[str]) -> None:
    """Parse as the program would, and run nothing; raises what the program would show.

    A command named without arguments is a mention: it must exist.
    """
    command = typer.main.get_command(program())
    name = "optim"
    parent = None
    while True:
        parent = command.make_context(name, list(arguments) or ["--help"], parent=parent)
        if not hasattr(command, "resolve_command"):
            return
        arguments = [*parent._protected_args, *parent.args]
        found, command, arguments = command.resolve_command(parent, arguments)
        name = str(found)


def examples() -> list[list[str]]:
    """The command lines that the help of the commands ends with."""
    commands: dict[str, Any] = typer.main.get_command(program()).commands  # type: ignore[attr-defined]
    ends = [command.epilog or "" for command in commands.values()]
    lines = [part for end in ends for part in pipeline(end.removeprefix("Example: "))]
    return [line[1:] for line in lines if line[:1] == ["optim"]]


def test_examples_of_the_help_name_recipes_that_exist() -> None:
    found = examples()
    named = [line[1] for line in found if line[0] == "apply"]
    named += [line[line.index("--recipe") + 1] for line in found if "--recipe" in line]
    assert len(found) > 10 and named
    built_in = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert built_in >= {name for name in named if not name.endswith(".yaml")}


LINES = [(page.name, line) for page in PAGES for line in command_lines(page.read_text("utf-8"))]


@pytest.mark.parametrize(("page", "line"), LINES, ids=lambda v: v if isinstance(v, str) else "")
def test_the_program_understands(page: str, line: list[str]) -> None:
    try:
        parse(line)
    except typer.Exit as stop:  # --help
        assert stop.exit_code == 0


def test_the_documents_were_read() -> None:
    assert {page for page, _ in LINES} >= {"README.md", "tour.md", "artifact.md"}
    assert len(LINES) > 20


WRONG = ["quantise x", "run small --temprature 1", "eval --json", "recipe lst"]


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_line_would_be_noticed(line: str) -> None:
    with pytest.raises(Exception, match=r"No such (command|option)|Missing parameter"):
        parse(line.split())


def test_lines_are_found() -> None:
    text = '`optim run M "a b"` `other`\n```console\n$ cat x | optim run M \\\n  --raw > y\nno\n```'
    assert command_lines(text) == [["run", "M", "a b"], ["run", "M", "--raw"]]
