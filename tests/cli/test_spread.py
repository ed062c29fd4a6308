"""Groups of flags: the object that a command gets, and the flags that its command line has."""

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from optim.cli.spread import spread


@dataclass(frozen=True)
class Base:
    device: Annotated[str, typer.Option("--device")] = "auto"
    quiet: Annotated[bool, typer.Option("--quiet")] = False


@dataclass(frozen=True)
class Work(Base):
    bits: Annotated[int, typer.Option("--bits", min=2)] = 4


Seen = list[tuple[str, Work]]


@pytest.fixture
def seen() -> Seen:
    return []


def program(seen: Seen, **fixed: object) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    @spread(**fixed)
    def command(model: str, *, work: Work) -> None:
        """A command."""
        seen.append((model, work))

    return app


def test_a_field_is_a_flag_and_its_default_the_flags(seen: Seen) -> None:
    assert CliRunner().invoke(program(seen), ["m", "--bits", "3", "--quiet"]).exit_code == 0
    assert CliRunner().invoke(program(seen), ["m"]).exit_code == 0
    assert seen == [("m", Work(bits=3, quiet=True)), ("m", Work())]


def test_the_fields_of_a_class_come_before_those_it_inherits() -> None:
    shown = CliRunner().invoke(program([]), ["--help"]).output
    assert shown.index("--bits") < shown.index("--device") < shown.index("--quiet")


def test_what_an_option_checks_is_checked(seen: Seen) -> None:
    assert CliRunner().invoke(program(seen), ["m", "--bits", "1"]).exit_code == 2
    assert not seen


def test_a_fixed_field_has_its_value_and_no_flag(seen: Seen) -> None:
    app = program(seen, device="cpu")
    assert CliRunner().invoke(app, ["m"]).exit_code == 0
    assert seen == [("m", Work(device="cpu"))]
    assert CliRunner().invoke(app, ["m", "--device", "cuda"]).exit_code == 2
