"""Chat templates: where a model folder keeps its own, and how it is rendered.

A template is a jinja program that came with the model, so it runs in jinja's sandbox.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.storage.tensors import load_json

Message = dict[str, str]


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _environment() -> ImmutableSandboxedEnvironment:
    """What Hugging Face chat templates may use."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    made.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The default chat template, from any of the places where it is kept."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    kept = settings.get("chat_template")
    if kept is None and (folder / "chat_template.json").is_file():
        kept = load_json(folder / "chat_template.json").get("chat_template")
    if isinstance(kept, list):
        kept = {str(item.get("name")): item.get("template") for item in kept}.get("default")
    return kept if isinstance(kept, str) else None


def render_template(template: str, messages: Sequence[Message], variables: dict[str, Any]) -> str:
    """The chat as the template writes it. OptimError (2) if the template refuses it."""
    known = {"tools": None, "documents": None, **variables, "messages": list(messages)}
    try:
        return _environment().from_string(template).render(known)
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        fix = "check the roles and their order; some models take no system message"
        raise OptimError(f"the chat template refuses this chat: {error}", fix, USAGE) from None
