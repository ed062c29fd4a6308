"""Every option that a message names exists, on a command that could have said it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from optim.cli.app import program

ROOT = Path(__file__).parents[2]
FOLDERS = ("recipes", "runtime", "quant", "prune", "export", "cli")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
MENTION = re.compile(r"optim ([a-z]+(?: (?:list|show|check|schema))?)((?: [^`\n;,]*)?)")
OTHERS = {  # options of other programs that messages and calls name
    *("--merge", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", "--dest"),
    *("--version", "--help"),
}


def commands() -> dict[str, set[str]]:
    """Each command's options."""
    main: Any = typer.main.get_command(program())
    found = {name: options(command) for name, command in main.commands.items()}
    recipe = main.commands["recipe"].commands
    return found | {f"recipe {name}": options(command) for name, command in recipe.items()}


def options(command: Any) -> set[str]:
    return {"--help"} | {o for p in command.params for o in [*p.opts, *p.secondary_opts]}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """The strings of a module, docstrings left out; f-strings with their gaps as `{}`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(v) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for v in n.values}
    docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield (
                node.lineno,
                "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values),
            )
        elif isinstance(node, ast.Constant) and id(node) not in inside | docs:
            yield node.lineno, str(node.value)


FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
FLAGS = {"cli/flags.py", "recipes/schema.py", "cli/recipe_flags.py", "recipes/keys.py"}


def wrong(text: str, known: dict[str, set[str]]) -> list[str]:
    """Options that no command has, commands that do not exist, and options they do not have."""
    every = set().union(*known.values()) | OTHERS
    found = [option for option in OPTION.findall(text) if option not in every]
    for name, rest in MENTION.findall(text):
        if name in known:
            found += [f"{name} {o}" for o in OPTION.findall(rest) if o not in known[name]]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_option_that_is_named_exists(path: Path) -> None:
    if str(path.relative_to(ROOT)) in FLAGS:
        return
    known = commands()
    assert [(line, w) for line, text in texts(path) for w in wrong(text, known)] == []


def test_a_wrong_fix_is_noticed() -> None:
    known = commands()
    assert wrong("name it with --text-colum", known) == ["--text-colum"]
    assert wrong("`optim eval M --seq-len 4`", known) == ["eval --seq-len"]
    assert wrong("`optim quantize M --seq-len 4` or --window", known) == []


# What only one command can say, by the module that says it.
OWN = {
    "runtime/measure/quality.py": {"eval"},
    "runtime/measure/peers.py": {"bench"},
    "cli/evaluate.py": {"eval"},
    "cli/bench.py": {"bench"},
    "cli/run.py": {"run"},
    "runtime/engine": {"run", "bench"},
    "runtime/cache": {"run", "bench"},
    "quant": {"quantize"},
    "quant/mixed": {"plan"},
    "prune": {"prune"},
    "export": {"pack", "unpack", "export"},
}


@pytest.mark.parametrize(("part", "names"), OWN.items(), ids=list(OWN))
def test_a_command_names_its_own_options(part: str, names: set[str]) -> None:
    """An option that stands alone in a message is one of the commands that can print it."""
    known = commands()
    here = set().union(*(known[name] for name in names)) | OTHERS
    place = ROOT / part
    others = [ROOT / other for other in OWN if other.startswith(f"{part}/")]
    for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
        if any(path.is_relative_to(other) for other in others):
            continue
        for line, text in texts(path):
            alone = MENTION.sub("", text)
            assert not set(OPTION.findall(alone)) - here, f"{path}:{line}: {text}"
