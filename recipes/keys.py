"""The keys of a recipe as rows: what the flags, `--help` and docs/recipe.md are made from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from optim.recipes.schema import (
    SECTIONS,
    TRAINING,
    Calibration,
    Export,
    Pack,
    Section,
    Spelled,
    Tune,
)

# The sections a command reads, each with its models: a model a method where it has methods.
READS: dict[str, dict[str, Mapping[str, type[Section]]]] = {
    "quantize": {
        "quantize": SECTIONS["quantize"],
        "tune": {"": Tune},
        "calibration": {"": Calibration},
    },
    "prune": {"prune": SECTIONS["prune"], "calibration": {"": Calibration}},
    "pack": {"pack": {"": Pack}},
    "export": {"export": {"": Export}},
}


@dataclass(frozen=True, slots=True)
class Key:
    """One key: its dotted `path`, how it is typed, and what the methods say of it.

    `flags` is empty where only `--set` gives it; `kind` is bool, int, float or str, or object where
    the value is a word or a number; `choices` are empty where any value of the kind will do;
    `methods` are those that have the key, none if all have it; `defaults` has a value a method.
    """

    path: str
    flags: tuple[str, ...]
    about: str
    kind: type
    many: bool
    choices: tuple[Any, ...]
    methods: tuple[str, ...]
    defaults: Mapping[str, Any]

    @property
    def default(self) -> str:
        """The default as a recipe spells it, with the methods that have another; empty if none."""
        shown = {method: show(value) for method, value in self.defaults.items()}
        first = next(iter(shown.values()))
        others = [f"{method}: {text}" for method, text in shown.items() if text != first]
        return first + (f" ({', '.join(others)})" if others else "")

    @property
    def what(self) -> str:
        """What the key is, and its choices where the words do not name them all."""
        named = all(show(choice) in self.about for choice in self.choices)
        return self.about + ("" if named or self.kind is bool else f" ({_listed(self.choices)})")

    @property
    def help(self) -> str:
        """One line: the methods that have the key, what it is, and its default."""
        default = f" Default: {self.default}." if self.default else ""
        if self.methods:
            return f"{', '.join(self.methods)}: {self.what}.{default}"
        return f"{self.what[0].upper()}{self.what[1:]}.{default}"


@cache
def keys(command: str) -> tuple[Key, ...]:
    """The keys that a command reads, in the order of the schema."""
    return tuple(
        _key(command, section, name, models)
        for section, models in READS[command].items()
        for name in dict.fromkeys(name for model in models.values() for name in model.model_fields)
    )


def flag_of(path: str) -> str:
    """The flag that gives a dotted key; `--set PATH` where it has none of its own."""
    found = (key for command in READS for key in keys(command) if key.path == path and key.flags)
    key = next(found, None)
    return key.flags[-1].partition("/")[0] if key else f"--set {path}"


def show(value: Any) -> str:
    """A default as a recipe spells it; empty for none."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ", ".join(map(show, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _key(command: str, section: str, name: str, models: Mapping[str, type[Section]]) -> Key:
    if name == "method":
        return _method(section, tuple(models))
    having = {method: model.model_fields for method, model in models.items()}
    fields: dict[str, FieldInfo] = {m: all_[name] for m, all_ in having.items() if name in all_}
    first = next(iter(fields.values()))
    values = [value for field in fields.values() for value in _values(field.annotation)]
    kinds = {value if isinstance(value, type) else type(value) for value in values}
    spelled = next((m for m in first.metadata if isinstance(m, Spelled)), None)
    defaults = {method: field.default for method, field in fields.items()}
    if (command, section) == ("prune", "calibration") and name in TRAINING:
        defaults["prosparse"] = TRAINING[name]
    return Key(
        path=f"{section}.{name}",
        flags=_usual(name, kinds) if spelled is None else spelled.names,
        about=first.description or "",
        kind=kinds.pop() if len(kinds) == 1 else object,
        many=get_origin(first.annotation) is tuple,
        choices=tuple(dict.fromkeys(value for value in values if not isinstance(value, type))),
        methods=tuple(fields) if len(fields) < len(models) else (),
        defaults=defaults,
    )


def _method(section: str, methods: tuple[str, ...]) -> Key:
    """The key that chooses among a section's methods; the first one is the default."""
    defaults = {"": methods[0]} | ({"ReLU models": "relu-exact"} if section == "prune" else {})
    flags = ("-m", "--method")
    return Key(f"{section}.method", flags, "the method", str, False, methods, (), defaults)


def _usual(name: str, kinds: set[type]) -> tuple[str, ...]:
    dashed = name.replace("_", "-")
    return (f"--{dashed}/--no-{dashed}",) if kinds == {bool} else (f"--{dashed}",)


def _values(annotation: Any) -> Iterator[Any]:
    """The types that a key's value may have, and the values themselves where they are listed."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        yield from inner
    elif inner:  # a union, a tuple or an annotated type: `...` and None say nothing
        for part in inner:
            if part not in (..., NoneType):
                yield from _values(part)
    elif isinstance(annotation, type):
        yield annotation


def _listed(choices: tuple[Any, ...]) -> str:
    *most, last = map(show, choices)
    return f"{', '.join(most)} or {last}" if most else last
