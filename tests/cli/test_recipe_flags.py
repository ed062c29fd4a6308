"""The flags that are made from the schema: what can be typed, and that a new key is a flag."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from pydantic import Field

from optim.cli.app import program
from optim.cli.recipe_flags import with_keys
from optim.recipes import keys as module
from optim.recipes.keys import READS, keys
from optim.recipes.schema import SET_ONLY, Awq, Section

COMMANDS = ("quantize", "prune", "pack", "unpack")
BEFORE = Path(__file__).with_name("options.json")  # as they were when each was written by hand


def options(command: Any) -> dict[str, str]:
    """The spellings of each option; `*` for one that repeats, `!` for one without a value."""
    return {
        "/".join([*p.opts, *p.secondary_opts]): "*" if p.multiple else "!" if p.is_flag else ""
        for p in command.params
        if p.param_type_name == "option"
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_what_can_be_typed_is_what_it_was(name: str) -> None:
    made: Any = typer.main.get_command(program())
    assert options(made.commands[name]) == json.loads(BEFORE.read_text())[name]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A method with keys of every kind, beside one that has none of them."""

    class Toy(Section):
        tea_time: int = Field(default=5, description="hour of tea")
        milk: bool = Field(default=True, description="with milk")
        sugar: float | None = Field(default=None, description="spoons")
        kinds: tuple[str, ...] = Field(default=("oolong",), description="what is poured")
        how: int | str = Field(default="hot", description="a word or degrees")
        secret: Annotated[int, SET_ONLY] = Field(default=1, description="of the house")

    class Plain(Section):
        milk: bool = Field(default=False, description="with milk")

    monkeypatch.setitem(READS, "brew", {"brew": {"toy": Toy, "plain": Plain}})
    keys.cache_clear()
    yield
    keys.cache_clear()


def brew(arguments: list[str]) -> dict[str, Any]:
    """What a command gets for what is typed."""
    seen: dict[str, Any] = {}
    command = typer.Typer()

    @command.command()
    @with_keys("brew")
    def _brew(model: Annotated[str, typer.Argument()], dry: bool = False, **keys: Any) -> None:
        seen.update(keys | {"model": model, "dry": dry})

    command(arguments, standalone_mode=False)
    return seen


def test_a_key_of_the_schema_is_a_flag(toy: None) -> None:
    nothing = {f"brew.{key}": None for key in ("tea_time", "milk", "sugar", "kinds", "how")}
    assert brew(["x"]) == {"model": "x", "dry": False} | nothing
    words = "--tea-time 4 --no-milk --sugar 0.5 --kinds a --kinds b --how 70 --dry"
    assert brew(["x", *shlex.split(words)]) == {
        **{"model": "x", "dry": True, "brew.tea_time": 4, "brew.milk": False},
        **{"brew.sugar": 0.5, "brew.kinds": ["a", "b"], "brew.how": 70},
    }
    assert brew(["x", "--how", "cold"])["brew.how"] == "cold"


def test_its_help_says_whose_it_is_and_its_default(toy: None) -> None:
    help_of = {key.path: key.help for key in keys("brew")}
    assert help_of["brew.tea_time"] == "toy: hour of tea. Default: 5."
    assert help_of["brew.milk"] == "With milk. Default: true (plain: false)."
    assert help_of["brew.sugar"] == "toy: spoons."
    assert module.flag_of("brew.secret") == "--set brew.secret"


@pytest.mark.parametrize("name", READS)
def test_every_key_says_what_it_is(name: str) -> None:
    assert [key.path for key in keys(name) if not key.about] == []


def test_choices_are_those_of_all_methods() -> None:
    bits = next(key for key in keys("quantize") if key.path == "quantize.bits")
    assert bits.choices == (2, 3, 4, 8) and bits.kind is int and bits.methods == ()
    damping = next(key for key in keys("quantize") if key.path == "quantize.damping")
    assert damping.methods == ("awq", "gptq", "mergequant")
    assert re.search(r"Default: 0\.1 \(mergequant: 0\.01\)", damping.help)
    assert set(Awq.model_fields) <= {key.path.rpartition(".")[2] for key in keys("quantize")}
