"""The slash commands of a conversation: functions, and the table that names them.

A command takes the conversation and the rest of its line. Help, completion and "did you mean" all
come from the table at the end.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from optim.cli import ui
from optim.cli.conversation import saved
from optim.cli.conversation.chat import Chat, answer, describe
from optim.recipes.errors import USAGE, OptimError

if TYPE_CHECKING:
    from optim.runtime.engine.sampling import Sampling


def _help(chat: Chat, _rest: str) -> None:
    width = max(len(command.usage) for command in COMMANDS)
    for command in COMMANDS:
        ui.note(f"  {command.usage:<{width}}  {command.help}")
    ui.note('  Alt-Enter makes a new line; """ opens and closes a message of many lines')


def _clear(chat: Chat, _rest: str) -> None:
    chat.session.messages = []
    ui.note("the conversation is empty; the system prompt stays")


def _system(chat: Chat, rest: str) -> None:
    if rest:
        chat.session.system = "" if rest in ('""', "none") else rest
    ui.note(f"system: {chat.session.system or '(none)'}")


def _set(chat: Chat, rest: str) -> None:
    key, _, text = rest.partition(" ")
    if key:
        value = _parse(get_type_hints(type(chat.session.sampling)), key, text.strip())
        chat.session.sampling = replace(chat.session.sampling, **{key: value})
    for name, value in asdict(chat.session.sampling).items():
        if key in ("", name):
            ui.note(f"{name} = {_show(value)}")


def _show(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(repr, value)) or "none"
    return "none" if value is None else str(value)


def _parse(kinds: dict[str, Any], key: str, text: str) -> Any:
    """The value of a sampling parameter as typed; raises OptimError (code 2)."""
    if key not in kinds:
        raise _unknown("parameter", key, list(kinds))
    if not text:
        raise OptimError(f"/set {key} needs a value", fix=f"/set {key} VALUE", code=USAGE)
    kind = kinds[key]
    if get_origin(kind) is tuple:
        return () if text == "none" else tuple(_words(text))
    if text == "none" and NoneType in get_args(kind):
        return None
    try:
        return TypeAdapter(kind).validate_python(text)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise OptimError(f"{key}: {reason} (got {text!r})", code=USAGE) from None


def _words(text: str) -> list[str]:
    try:
        return [word.replace("\\n", "\n") for word in shlex.split(text)]
    except ValueError as error:
        raise OptimError(f"stop: {error}", fix='/set stop "text" "other"', code=USAGE) from None


def _switch(command: str, rest: str, now: bool) -> bool:
    """What `on` or `off` asks for; without one, what is `now`."""
    if rest not in ("", "on", "off"):
        raise OptimError(f"{command} takes on or off, not {rest!r}", code=USAGE)
    return rest == "on" if rest else now


def _stats(chat: Chat, rest: str) -> None:
    chat.show_stats = _switch("/stats", rest, chat.show_stats)
    if rest:
        ui.note(f"statistics after each reply: {rest}")
    elif chat.session.stats.new_tokens:
        ui.note(describe(chat.session.stats, stopped=False))
    else:
        ui.note("no reply yet")


def _markdown(chat: Chat, rest: str) -> None:
    chat.markdown = _switch("/markdown", rest, chat.markdown)
    ui.note(f"styles for headings, strong words and code: {'on' if chat.markdown else 'off'}")


def _take_back(chat: Chat) -> str:
    """Remove the last question and its reply; returns the question."""
    messages = chat.session.messages
    for place in reversed(range(len(messages))):
        if messages[place]["role"] == "user":
            chat.session.messages = messages[:place]
            return messages[place]["content"]
    raise OptimError("there is no question yet", code=USAGE)


def _retry(chat: Chat, _rest: str) -> None:
    question = _take_back(chat)
    if chat.session.sampling.temperature == 0:
        ui.note("temperature 0 gives the same reply; /set temperature 0.7 varies it")
    elif chat.session.sampling.seed is not None:
        ui.note("the same seed gives the same reply; /set seed none varies it")
    answer(chat, question)


def _undo(chat: Chat, _rest: str) -> None:
    question = " ".join(_take_back(chat).split())
    ui.note(f"taken back: {question[:60]}{'…' if len(question) > 60 else ''}")


def _save(chat: Chat, rest: str) -> None:
    name = chat.session.model.checkpoint.name
    default = chat.file or Path(f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.json")
    path = Path(rest).expanduser() if rest else default
    content = saved.SavedChat(
        model=chat.session.model.checkpoint.source,
        system=chat.session.system or None,
        parameters=_plain(asdict(chat.session.sampling)),
        messages=[saved.Message.model_validate(message) for message in chat.session.messages],
    )
    saved.save(path, content)
    chat.file = path
    beside = saved.cache_beside(path)
    nbytes = chat.session.save_cache(beside) if content.messages else 0
    cache = f", its cache {ui.size(nbytes)}" if nbytes else ""
    ui.note(f"saved {path} ({len(content.messages)} messages{cache})")


def _plain(parameters: dict[str, Any]) -> dict[str, Any]:
    return {key: list(v) if isinstance(v, tuple) else v for key, v in parameters.items()}


def _load(chat: Chat, rest: str) -> None:
    if not rest:
        raise OptimError("/load needs a file", fix="/load FILE", code=USAGE)
    path = Path(rest).expanduser()
    content = saved.load(path)
    chat.session.sampling = _sampling(type(chat.session.sampling), content.parameters, path)
    chat.session.system = content.system or ""
    chat.session.messages = [message.model_dump() for message in content.messages]
    chat.file = path
    ui.note(f"loaded {path} ({len(content.messages)} messages)")
    if content.model != chat.session.model.checkpoint.source:
        ui.note(f"note: it was saved with {content.model}")
    if content.messages and (why := chat.session.load_cache(saved.cache_beside(path))):
        ui.note(f"{why}: the conversation will be read again")


def _sampling(kind: type[Sampling], parameters: dict[str, Any], path: Path) -> Sampling:
    known = [field.name for field in fields(kind)]
    for key in parameters:
        if key not in known:
            raise _unknown("parameter", key, known)
    try:
        return TypeAdapter(kind).validate_python(parameters)
    except ValidationError as error:
        first = error.errors()[0]
        raise OptimError(f"{path}: {first['loc'][0]}: {first['msg']}", code=USAGE) from None


def _info(chat: Chat, _rest: str) -> None:
    session = chat.session
    facts = {
        **session.info(),
        "sampling": session.sampling.summary,
        "system": session.system or "(none)",
        "messages": len(session.messages),
    }
    for name, value in facts.items():
        ui.note(f"{name:<10} {value}")


def _quit(chat: Chat, _rest: str) -> None:
    chat.done = True


@dataclass(frozen=True, slots=True)
class Command:
    """A slash command: how it is typed, what it does, and the function that does it."""

    usage: str
    help: str
    handler: Callable[[Chat, str], None]
    aliases: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.usage.split()[0]


COMMANDS = (
    Command("/help", "this list", _help, ("/?",)),
    Command("/clear", "forget the conversation", _clear, ("/new",)),
    Command("/system [TEXT]", 'show or set the system prompt; "" removes it', _system),
    Command("/set [KEY VALUE]", "show or set a sampling parameter", _set),
    Command("/stats [on|off]", "speed of the last reply, or after each one", _stats),
    Command("/markdown [on|off]", "styles for headings, strong words and code", _markdown),
    Command("/retry", "ask the last question again", _retry),
    Command("/undo", "take back the last question and its reply", _undo),
    Command("/save [FILE]", "write the conversation to a JSON file", _save),
    Command("/load FILE", "go on with a saved conversation", _load),
    Command("/info", "the model and its context", _info),
    Command("/quit", "leave", _quit, ("/exit", "/bye")),
)


def find(text: str) -> Command | None:
    """The command that `text` calls, or None if it is a message; OptimError (2) if unknown.

    Only a slash and letters make a command, so a message may open with a path.
    """
    word = text.split(maxsplit=1)[0] if text else ""
    if not re.fullmatch(r"/([a-z]+|\?)", word):
        return None
    for command in COMMANDS:
        if word in (command.name, *command.aliases):
            return command
    names = [name for command in COMMANDS for name in (command.name, *command.aliases)]
    raise _unknown("command", word, names)


def endings(chat: Chat, typed: str) -> list[str]:
    """Completions of the last word of a line: commands, parameters, files."""
    first, space, rest = typed.partition(" ")
    if not typed.startswith("/") or "\n" in typed:
        return []
    if not space:
        return [command.name for command in COMMANDS if command.name.startswith(first)]
    if first == "/set":
        return [f.name for f in fields(chat.session.sampling) if f.name.startswith(rest)]
    if first in ("/stats", "/markdown"):
        return [word for word in ("on", "off") if word.startswith(rest)]
    if first in ("/save", "/load"):
        return _files(rest)
    return []


def _files(typed: str) -> list[str]:
    folder, slash, start = typed.rpartition("/")
    try:
        found = sorted(Path(folder + slash).expanduser().iterdir())
    except OSError:
        return []
    return [
        folder + slash + path.name + ("/" if path.is_dir() else "")
        for path in found
        if path.name.startswith(start)
        and (path.is_dir() or path.suffix == ".json")
        and (start or not path.name.startswith("."))
    ]


def _unknown(what: str, name: str, known: list[str]) -> OptimError:
    close = get_close_matches(name, known, n=1)
    listing = ", ".join(known) if what == "parameter" else "/help lists them"
    fix = f"did you mean {close[0]!r}?" if close else listing
    return OptimError(f"unknown {what} {name!r}", fix=fix, code=USAGE)
