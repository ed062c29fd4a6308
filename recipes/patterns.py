"""Which linears a recipe speaks of: exact names, `Linear` (all of them), or `re:` expressions.

The spelling and the meaning are those of compressed-tensors: a `re:` expression is matched from the
start of the module's name and need not reach its end.
"""

import re
from typing import Annotated

from pydantic import AfterValidator

MAX_LENGTH = 256
MAX_REPEATS = 6

# What stands for one character, and the marks of groups and of repeats that are no repeats.
_ONE = re.compile(r"\\.|\[\^?\]?[^\]]*\]")
_MARKS = re.compile(r"(?<=\()\?[:=!]|(?<=[*+?}])[?+]")


def check_pattern(text: str) -> str:
    """Return `text` if it is a usable pattern, else raise ValueError with the reason.

    A recipe may come from a stranger, so an expression whose match can take forever is refused:
    a repeat of what itself varies, or many repeats one after another.
    """
    if not text:
        raise ValueError("a pattern must not be empty")
    if len(text) > MAX_LENGTH:
        raise ValueError(f"a pattern must be at most {MAX_LENGTH} characters (got {len(text)})")
    if not text.startswith("re:"):
        return text
    expression = text.removeprefix("re:")
    try:
        re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{text!r} is not a valid regular expression: {error}") from None
    if _could_take_forever(expression):
        raise ValueError(f"{text!r} repeats too much: it could take forever to match")
    return text


def _could_take_forever(expression: str) -> bool:
    """Whether there are many repeats, or one of a group with a choice or a repeat inside."""
    bare = _MARKS.sub("", _ONE.sub("x", expression))
    if sum(bare.count(repeat) for repeat in "*+?{") > MAX_REPEATS:
        return True
    open_groups, varies = [False], False  # whether a group varies; whether the last closed one did
    for before, letter in zip(" " + bare, bare, strict=False):
        if letter in "*+?{" and before == ")" and varies:
            return True
        if letter == "(":
            open_groups.append(False)
        elif letter == ")" and len(open_groups) > 1:
            varies = open_groups.pop()
            open_groups[-1] |= varies
        elif letter in "|*+?{":
            open_groups[-1] = True
    return False


def matches(pattern: str, name: str, kind: str = "Linear") -> bool:
    """Whether `pattern` speaks of the module `name` whose class is `kind`."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return pattern in (name, kind)


Pattern = Annotated[str, AfterValidator(check_pattern)]
