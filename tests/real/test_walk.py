"""What the walk over real models types: every command is in it, and its order can be followed."""

import importlib.util
import shlex
from pathlib import Path

import typer

from optim.cli.app import program

HERE = Path(__file__)
spec = importlib.util.spec_from_file_location("walk", HERE.with_name("run.py"))
assert spec is not None and spec.loader is not None
walk = importlib.util.module_from_spec(spec)
spec.loader.exec_module(walk)


def test_every_command_is_walked() -> None:
    typed = [*walk.FIRST.split("\n"), *walk.LAST.split("\n"), *(t for t, _ in walk.MADE.values())]
    walked = {line.split()[0] for line in typed if line} | {"serve"}
    hubs = {"pull", "push", "rm"}  # a hub's, and the cache's that the model is in
    commands: dict[str, object] = typer.main.get_command(program()).commands  # type: ignore[attr-defined]
    assert walked == set(commands) - hubs


def test_what_is_read_was_made_before() -> None:
    made: set[str] = {"MODEL"}
    for name, (typed, _) in walk.MADE.items():
        command, *words = shlex.split(typed)
        read = words[1] if command == "apply" else words[0]
        assert read in made, typed
        made.add(name)
