"""A conversation as a file: model, system prompt, parameters and messages, as JSON.

Files are written whole or not at all, and a file that is not a conversation is never written over.
What is read is checked before any of it is used: a file may come from anyone.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Literal, NoReturn

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from optim.recipes.errors import USAGE, OptimError

LARGEST = 64 << 20


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    role: Literal["user", "assistant"]
    content: str


class SavedChat(BaseModel):
    """The file's content. `parameters` are those of `Sampling`, checked where they are used."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["optim chat"] = "optim chat"
    version: Literal[1] = 1
    model: str
    system: str | None = None
    parameters: dict[str, float | int | list[str] | None] = {}
    messages: list[Message] = []

    @model_validator(mode="after")
    def _turns(self) -> SavedChat:
        for place, message in enumerate(self.messages):
            if message.role != ("user", "assistant")[place % 2]:
                raise ValueError(f"message {place} is out of turn: user and assistant take turns")
        return self


def save(path: Path, chat: SavedChat) -> None:
    """Write `chat` to `path` in one step; raises OptimError (code 2) over another kind of file."""
    try:
        path = path.resolve()
        if path.exists() and not _is_chat(path):
            raise OptimError(
                f"{path} exists and is not a saved conversation",
                fix="choose another name",
                code=USAGE,
            )
        _replace(path, chat.model_dump_json(indent=2) + "\n")
    except (OSError, ValueError) as error:
        _fail(path, error, "save to")


def load(path: Path) -> SavedChat:
    """Read and check a saved conversation; raises OptimError (code 2) on anything else."""
    try:
        if not path.is_file():
            found = "is not a file" if path.exists() else "does not exist"
            raise OptimError(f"{path} {found}", fix="give the path of a saved chat", code=USAGE)
        if path.stat().st_size > LARGEST:
            raise OptimError(
                f"{path} is too large to be a conversation ({path.stat().st_size >> 20} MB)",
                fix=f"conversations are at most {LARGEST >> 20} MB",
                code=USAGE,
            )
        return SavedChat.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise OptimError(
            f"{path} is not a saved conversation: {place + ': ' if place else ''}{first['msg']}",
            fix="/load takes files that /save wrote",
            code=USAGE,
        ) from None
    except (OSError, ValueError) as error:
        _fail(path, error, "read")


def cache_beside(path: Path) -> Path:
    """Where the cache of the conversation in `path` is kept: `talk.json.cache.safetensors`."""
    path = path.resolve()
    return path.with_name(f"{path.name}.cache.safetensors")


def _is_chat(path: Path) -> bool:
    try:
        load(path)
    except OptimError:
        return False
    return True


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _fail(path: Path, error: OSError | ValueError, verb: str) -> NoReturn:
    reason = getattr(error, "strerror", None) or error
    raise OptimError(f"cannot {verb} {path}: {reason}", fix="choose another path", code=USAGE)
