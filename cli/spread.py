"""Groups of flags: a command takes an object, its command line has a flag for each field of it."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from inspect import Parameter, get_annotations, signature
from typing import Any, get_type_hints

Command = Callable[..., None]


def spread(**fixed: Any) -> Callable[[Command], Command]:
    """Replace each parameter of a command that is a dataclass by its fields, a flag each.

    A field named in `fixed` has that value and no flag. `--help` lists the fields of a class before
    those that it inherits.
    """

    def decorate(work: Command) -> Command:
        groups: dict[str, Any] = {
            parameter.name: parameter.annotation
            for parameter in signature(work).parameters.values()
            if is_dataclass(parameter.annotation)
        }

        @wraps(work)
        def run(**given: Any) -> None:
            given = fixed | given
            made = {
                name: group(**{field.name: given.pop(field.name) for field in fields(group)})
                for name, group in groups.items()
            }
            work(**given, **made)

        run.__signature__ = signature(work).replace(  # type: ignore[attr-defined]
            parameters=[
                flag
                for parameter in signature(work).parameters.values()
                for flag in _flags(parameter)
                if flag.name not in fixed
            ]
        )
        del run.__annotations__, run.__wrapped__
        return run

    return decorate


def _flags(parameter: Parameter) -> list[Parameter]:
    """The fields of a group; any other parameter is itself one."""
    if not is_dataclass(parameter.annotation):
        return [parameter]
    group: Any = parameter.annotation
    own = [name for kind in group.__mro__ for name in get_annotations(kind)]
    hints = get_type_hints(group, include_extras=True)
    default = {field.name: field.default for field in fields(group)}
    return [
        parameter.replace(name=name, default=default[name], annotation=hints[name])
        for name in dict.fromkeys(own)
    ]
