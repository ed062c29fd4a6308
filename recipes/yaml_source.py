"""YAML read as plain data, with the line of every key.

Stricter than PyYAML: no tags, no aliases (a few of them can stand for a billion values), no key
twice, and scalars as in YAML 1.2, where `1e-2` is a number and `off` a word.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from optim.recipes.errors import USAGE, OptimError
from optim.recipes.problems import Path, Place, Problem, RecipeError

MAX_BYTES = 256 * 1024

_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")}
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_INT = re.compile(r"[-+]?[0-9]{1,30}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]{1,4})?")


def decode(raw: bytes, name: str) -> str:
    """The text of a recipe file; OptimError (2) if it is too large or not UTF-8."""
    if len(raw) > MAX_BYTES:
        message = f"{name} is larger than {MAX_BYTES // 1024} KiB: it is hardly a recipe"
        raise OptimError(message, fix="give the recipe's YAML file", code=USAGE)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"{name} is not UTF-8 text (byte {error.start})"
        raise OptimError(message, fix="save the recipe as UTF-8", code=USAGE) from None


def parse_mapping(text: str, name: str) -> tuple[dict[str, Any], dict[Path, Place]]:
    """A YAML document that is a mapping, and the place of each of its values.

    Raises RecipeError with all that is wrong with the YAML itself.
    """
    node = _compose(text, name)
    if not isinstance(node, yaml.MappingNode):
        what = "empty" if node is None else "not a mapping of keys to values"
        raise OptimError(f"{name} is {what}", fix="`optim recipe show awq-w4` is one", code=USAGE)
    reader = _Reader(name)
    data = reader.read(node, ())
    if reader.problems:
        raise RecipeError(name, reader.problems)
    assert isinstance(data, dict)
    return data, reader.places


def parse_value(text: str, name: str) -> Any:
    """The value of `--set key=value`: a YAML scalar, or a list or mapping in brackets."""
    node = _compose(text, name)
    if node is None:
        return None
    reader = _Reader(name)
    value = reader.read(node, ())
    if reader.problems:
        raise RecipeError(name, reader.problems)
    return value


def _compose(text: str, name: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise OptimError(f"{where}: not valid YAML: {error.problem}", code=USAGE) from None
    except yaml.reader.ReaderError as error:
        message = f"{name} has a character that YAML does not allow (#x{error.character:02x})"
        raise OptimError(message, code=USAGE) from None
    except RecursionError:
        raise OptimError(f"{name} is nested too deeply to be a recipe", code=USAGE) from None


class _Reader:
    """One walk over the nodes: the data, the places, and what is wrong."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.places: dict[Path, Place] = {}
        self.problems: list[Problem] = []
        self._seen: set[int] = set()

    def read(self, node: yaml.Node, path: Path) -> Any:
        """The data of `node`, which stands at `path`."""
        self.places.setdefault(path, self._place(node))
        if id(node) in self._seen:
            self._complain(node, "aliases (*name) are not allowed; write the value again")
            return None
        self._seen.add(id(node))
        if node.tag not in _TAGS:
            self._complain(node, f"tags ({node.tag}) are not allowed")
            return None
        if isinstance(node, yaml.MappingNode):
            return {key: self.read(value, (*path, key)) for key, value in self._pairs(node, path)}
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*path, i)) for i, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return node.value if node.style else _scalar(node.value)

    def _pairs(self, node: yaml.MappingNode, path: Path) -> Iterator[tuple[str, yaml.Node]]:
        first: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                self._complain(key, "a key must be a word")
            elif key.value in first:
                before = first[key.value]
                self._complain(key, f"duplicate key {key.value!r} (first on line {before})")
            else:
                first[key.value] = line
                self.places[(*path, key.value)] = self._place(key)
                yield key.value, value

    def _place(self, node: yaml.Node) -> Place:
        line = node.start_mark.line + 1
        return Place(line, f"{self.name}:{line}")

    def _complain(self, node: yaml.Node, text: str) -> None:
        self.problems.append(Problem(self._place(node), text))


def _scalar(text: str) -> Any:
    """A plain scalar as in YAML 1.2's core schema."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text
