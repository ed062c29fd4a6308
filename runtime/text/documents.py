"""Documents from wherever text is kept: built-in texts, files, folders, data sets.

A document is a text or a chat (a list of messages). Records (JSONL, parquet, hub data sets) give
their `text_column`, or else `messages`.
"""

import json
import os
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from optim.recipes.errors import MACHINE, USAGE, OptimError
from optim.runtime.text.chat_template import Message

Document = str | list[Message]
# Kinds of the built-in calibration text, and how many of 16 windows each gives.
MIXED = {"technical": 6, "chat": 3, "code": 3, "prose": 2, "languages": 2}
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
PIECE = 1 << 16  # characters: a book is handed out in pieces, so that one file is not one document
SPECS = (
    "builtin:mixed, a .txt, .md, .jsonl or .parquet file, a folder of them, a hub data set, self"
)


def builtin(name: str) -> Iterator[Document]:
    """The documents of a built-in text: `chat` holds messages, the others plain text."""
    folder = files("optim.runtime.text") / "data"
    if name == "chat":
        for line in (folder / "chat.jsonl").read_text(encoding="utf-8").splitlines():
            yield json.loads(line)["messages"]
    else:
        yield from (folder / f"{name}.txt").read_text(encoding="utf-8").split("\f\n")


def _pieces(text: str) -> Iterator[str]:
    """A long text in pieces that end at a line's end where there is one."""
    start = 0
    while start < len(text):
        end = min(start + PIECE, len(text))
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _text_file(path: Path) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OptimError(f"{path} is not UTF-8 text: {error.reason}", code=USAGE) from None
    except OSError as error:
        raise OptimError(f"cannot read {path}: {error.strerror}", code=USAGE) from None
    yield from _pieces(text)


def _is_chat(value: Any) -> bool:
    """Turns with a role and a text; one that calls tools may be without text."""
    return isinstance(value, list) and all(
        isinstance(turn, dict)
        and isinstance(turn.get("role"), str)
        and (isinstance(turn.get("content"), str) or "tool_calls" in turn)
        for turn in value
    )


def _text_of(turn: dict[str, Any]) -> str:
    text = turn.get("content")
    return text if isinstance(text, str) else ""


def _record(record: Any, text_column: str, where: str) -> Document:
    """The document in one record; OptimError (2) names the columns there are."""
    if isinstance(record, dict) and isinstance(record.get(text_column), str):
        return str(record[text_column])
    if isinstance(record, dict) and _is_chat(record.get("messages")):
        return [{"role": t["role"], "content": _text_of(t)} for t in record["messages"]]
    there = ", ".join(map(str, record)) if isinstance(record, dict) else "no fields"
    raise OptimError(
        f"{where} has neither a text in {text_column!r} nor chat messages; it has: {there}",
        "name the column of the text with --text-column",
        USAGE,
    )


def _jsonl(path: Path, text_column: str) -> Iterator[Document]:
    with path.open(encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _record(json.loads(line), text_column, f"{path}:{number}")
        except (ValueError, RecursionError) as error:
            fix = "every line must be one JSON object"
            raise OptimError(f"{path} is not valid JSONL: {error}", fix, USAGE) from None


def _parquet(path: Path, text_column: str) -> Iterator[Document]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
            for record in batch.to_pylist():
                yield _record(record, text_column, str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise OptimError(f"{path} is not a readable parquet file: {error}", code=USAGE) from None


def _path(path: Path, text_column: str) -> Iterator[Document]:
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in SUFFIXES)
        if not inside:
            raise OptimError(f"{path} has no {', '.join(SUFFIXES)} file", f"give {SPECS}", USAGE)
        for file in inside:
            yield from _path(file, text_column)
    elif path.suffix == ".jsonl":
        yield from _jsonl(path, text_column)
    elif path.suffix == ".parquet":
        yield from _parquet(path, text_column)
    else:
        yield from _text_file(path)


def _hub(spec: str, split: str | None, text_column: str, seed: int | None) -> Iterator[Document]:
    """A hub data set `owner/name` or `owner/name:configuration`, streamed."""
    import datasets  # type: ignore[import-untyped]

    name, _, configuration = spec.partition(":")
    try:
        found = datasets.load_dataset(
            name, configuration or None, split=split or "train", streaming=True
        )
        shuffled = found if seed is None else found.shuffle(seed=seed, buffer_size=1000)
        for record in shuffled:
            yield _record(record, text_column, spec)
    except OptimError:
        raise
    except Exception as error:  # every transport has its own exceptions
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        fix = f"check its name and split, or give text that is at hand: {SPECS}"
        raise OptimError(f"cannot read the data set {spec}: {why}", fix, MACHINE) from None


def documents(
    spec: str, *, split: str | None = None, text_column: str = "text", seed: int | None = None
) -> Iterator[Document]:
    """The documents of `spec`, in order; a data set is shuffled if there is a `seed`.

    Raises OptimError: 2 if there is no such text or it cannot be used, 4 if no hub answers.
    """
    kind, _, name = spec.partition(":")
    if kind == "builtin":
        if name not in ("mixed", "eval"):
            known = "builtin:mixed and builtin:eval"
            raise OptimError(f"there is no {spec}", f"the built-in texts are {known}", USAGE)
        for part in MIXED if name == "mixed" else ["eval"]:
            yield from builtin(part)
    elif (path := Path(os.path.expanduser(spec))).exists():
        yield from _path(path, text_column)
    elif spec.startswith((".", "/", "~")) or spec.endswith(SUFFIXES) or "/" not in spec:
        raise OptimError(f"there is no text {spec}", f"give {SPECS}", USAGE)
    else:
        yield from _hub(spec, split, text_column, seed)
