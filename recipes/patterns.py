"""Which linears a recipe speaks of: exact names, `Linear` (all of them), or `re:` expressions.

The spelling and the meaning are those of compressed-tensors: a `re:` expression is matched from the
start of the module's name and need not reach its end.

Recipes and checkpoints may come from a stranger, and every regular expression in them passes
`expression`, which keeps the time of a match small: a name has at most MAX_NAME letters, and what
may stand for any number of them may stand there MAX_SPANS times, so there are at most
MAX_NAME^MAX_SPANS / 6 ways to try, some three million.
"""

import re
from functools import lru_cache

from optim.recipes.errors import USAGE, OptimError

MAX_LENGTH = 256
MAX_REPEATS = 6  # `*`, `+`, `?` and `{` together
MAX_SPANS = 3  # of them `*`, `+` and `{`; one at the very end costs nothing
MAX_NAME = 256

# What stands for one character, and the marks of groups and of repeats that are no repeats.
_ONE = re.compile(r"\\.|\[\^?\]?[^\]]*\]")
_MARKS = re.compile(r"(?<=\()\?[:=!]|(?<=[*+?}])[?+]")
_LAST = re.compile(r"[*+]$|\{[\d,]*\}$")


def check_pattern(text: str) -> str:
    """Return `text` if it is a usable pattern, else raise ValueError with the reason."""
    if not text:
        raise ValueError("a pattern must not be empty")
    if text.startswith("re:"):
        expression(text.removeprefix("re:"))
    elif len(text) > MAX_LENGTH:
        raise ValueError(_too_long(text))
    return text


@lru_cache(maxsize=1024)
def expression(text: str) -> re.Pattern[str]:
    """A regular expression from outside, compiled; ValueError if its match could take forever.

    Refused are a repeat of what itself varies, and many repeats one after another.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(_too_long(text))
    try:
        made = re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{'re:' + text!r} is not a valid regular expression: {error}") from None
    if _could_take_forever(text):
        raise ValueError(f"{'re:' + text!r} repeats too much: it could take forever to match")
    return made


def _too_long(text: str) -> str:
    return f"a pattern must be at most {MAX_LENGTH} characters (got {len(text)})"


def _could_take_forever(text: str) -> bool:
    """Whether there are many repeats, or one of a group with a choice or a repeat inside."""
    bare = _MARKS.sub("", _ONE.sub("x", text))
    if sum(map(bare.count, "*+?{")) > MAX_REPEATS:
        return True
    if sum(map(_LAST.sub("", bare).count, "*+{")) > MAX_SPANS:
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
    """Whether a checked `pattern` speaks of the module `name` whose class is `kind`.

    Raises OptimError (2) for a name that is too long to be looked at.
    """
    if pattern.startswith("re:"):
        return expression(pattern.removeprefix("re:")).match(bounded(name)) is not None
    return pattern in (name, kind)


def bounded(name: str) -> str:
    """A name that an expression may be tried on; OptimError (2) beyond MAX_NAME letters."""
    if len(name) > MAX_NAME:
        message = f"a name of {len(name)} letters ({name[:40]}...): names have {MAX_NAME} at most"
        raise OptimError(message, "the checkpoint is damaged, or made to be so", USAGE)
    return name
