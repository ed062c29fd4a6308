"""The flags of the commands that read a recipe: one a key of the schema, made from it."""

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from typing import Annotated, Any

from typer import Option

from optim.recipes.keys import Key, keys
from optim.recipes.yaml_source import parse_value

Command = Callable[..., None]


def with_keys(command: str) -> Callable[[Command], Command]:
    """Replace the `**keys` of a command by the flags of the keys that it reads.

    The command then gets what was typed as a mapping of dotted keys to values, None for the rest.
    """
    found = {key.path.replace(".", "_"): key for key in keys(command) if key.flags}

    def decorate(work: Command) -> Command:
        first, *others = [p for p in signature(work).parameters.values() if p.kind != p.VAR_KEYWORD]

        @wraps(work)
        def run(**given: Any) -> None:
            typed = {key.path: _value(key, given.pop(name)) for name, key in found.items()}
            work(**given, **typed)

        made = [_parameter(name, key) for name, key in found.items()]
        run.__signature__ = signature(work).replace(  # type: ignore[attr-defined]
            parameters=[first, *made, *others]
        )
        del run.__annotations__, run.__wrapped__
        return run

    return decorate


def _parameter(name: str, key: Key) -> Parameter:
    panel = "Calibration" if key.path.startswith("calibration.") else "Method"
    option = Option(
        *key.flags,
        help=key.help,
        show_default=False,
        rich_help_panel=panel if key.methods or panel == "Calibration" else None,
    )
    kind = str if key.kind is object else key.kind
    typed: Any = list[kind] if key.many else kind  # type: ignore[valid-type]
    usual = Parameter.POSITIONAL_OR_KEYWORD
    return Parameter(name, usual, default=None, annotation=Annotated[typed | None, option])


def _value(key: Key, given: Any) -> Any:
    """What was typed; a key that takes a word or a number reads it as YAML does."""
    if key.kind is object and given is not None:
        return parse_value(given, key.flags[-1])
    return given
