"""A chat template rendered in a process of its own, whose time and memory are bounded.

A template is a program that came with the model. jinja's sandbox keeps it from files and modules,
but not from endless loops, doubling strings or nesting that is deeper than the stack; the operating
system does. This file is run as a script by `chat_template`: it imports jinja and nothing of optim,
so it starts in a tenth of a second, and then answers one line of JSON with one line of JSON:

    {"template": ..., "variables": {...}}  ->  {"text": ...} or {"error": ...}
"""

import contextlib
import functools
import json
import resource
import sys
from datetime import datetime
from typing import Any, NoReturn

MEMORY = 512 << 20
"""Bytes of address space."""
SECONDS = 2
"""Processor time of one rendering; the process is ended where it takes more."""
LONGEST = 1 << 20
"""Characters of a rendered chat, beyond four for each byte of the request."""


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """The filter as Hugging Face templates know it: no HTML escapes."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def environment() -> Any:
    """What Hugging Face chat templates may use."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's text for training; here it is its body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            found: list[nodes.Node] = parser.parse_statements(
                ("name:endgeneration",), drop_needle=True
            )
            return found

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


@functools.lru_cache(1)
def compiled(template: str) -> Any:
    """The template, ready to be rendered again and again."""
    return environment().from_string(template)


def answer(line: bytes) -> dict[str, str]:
    """The reply to one request."""
    asked = json.loads(line)
    try:
        text = compiled(asked["template"]).render(asked["variables"])
    except RecursionError:
        return {"error": "it nests or calls itself too deeply"}
    except MemoryError:
        return {"error": f"it takes more than {MEMORY >> 20} MB of memory"}
    except Exception as error:  # a template can raise whatever Python can
        return {"error": str(error)[:500] or type(error).__name__}
    if len(text) > LONGEST + 4 * len(line):
        return {"error": f"it writes {len(text):,} characters"}
    return {"text": text}


def _limit(kind: int, amount: int) -> None:
    with contextlib.suppress(ValueError, OSError):  # a stricter limit is in force, or none can be
        resource.setrlimit(kind, (amount, resource.getrlimit(kind)[1]))


def main() -> None:
    """Answer requests until there are no more."""
    environment()  # imports jinja before memory is short
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, MEMORY)
    for line in sys.stdin.buffer:
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + SECONDS)
        sys.stdout.write(json.dumps(answer(line)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.path[:] = json.loads(sys.argv[1])
    main()
