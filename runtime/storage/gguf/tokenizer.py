"""The tokenizer inside a GGUF file, as tokenizer.json and its companions in a folder.

transformers turns vocabulary and merges into a tokenizer. What it passes over is set here as
llama.cpp has it: how text is cut (`tokenizer.ggml.pre`), whether a word of the vocabulary needs
merges, and what is put around a text (`add_bos_token`, or the default of the vocabulary's kind).
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.storage.gguf.file import LongArray
from optim.runtime.storage.gguf.pre_tokenizers import BY_NAME, Rule, pre_tokenizer
from optim.runtime.system.files import damaged
from optim.runtime.system.hashes import bytes_sha256
from optim.runtime.system.paths import cache_folder

CONVERSION = 2  # to be raised when a file is to be converted otherwise than before
BYTE_LEVEL, PIECES = "gpt2", "llama"  # `tokenizer.ggml.model`; the latter is SentencePiece
PIECES_IDS = {"bos": 1, "eos": 2}  # of a SentencePiece vocabulary that does not say
OWN = "put the model's own tokenizer.json and tokenizer_config.json beside the .gguf file"


def sidecar_folder(path: Path, metadata: dict[str, Any], data: int) -> Path:
    """Folder with the tokenizer of a GGUF file: beside it if it is there, else made once and kept.

    The conversion takes seconds; its result stays in the cache under the hash of the file's head.
    Raises OptimError (2) for a vocabulary, or a way of cutting text, that is not known.
    """
    if (path.parent / "tokenizer.json").is_file():
        return path.parent
    folder = cache_folder() / "tokenizers" / _key(path, data)
    if (folder / "tokenizer.json").is_file():
        return folder
    rule = _rule(path, metadata)
    _check_counts(path, metadata)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
        _convert(path, made, metadata, rule)
        (made / "generation_config.json").write_text(json.dumps(_generation(metadata), indent=2))
        os.replace(made, folder)
    except OSError:  # another process was faster
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _key(path: Path, data: int) -> str:
    """A name for the conversion of this head by these programs."""
    programs = f"{CONVERSION} {version('transformers')}\n".encode()
    return bytes_sha256(chain([programs], _head(path, data)))[:32]


def _head(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while size > 0 and (block := file.read(min(size, 1 << 20))):
            yield block
            size -= len(block)


def _rule(path: Path, metadata: dict[str, Any]) -> Rule | None:
    """How a byte-level vocabulary cuts text; None for another kind, which has one way only."""
    if metadata.get("tokenizer.ggml.model") != BYTE_LEVEL:
        return None
    name = metadata.get("tokenizer.ggml.pre") or "default"
    if name not in BY_NAME:
        raise OptimError(f"{path} cuts its text by {name!r}, which is not known here", OWN, USAGE)
    return BY_NAME[name]


def _check_counts(path: Path, metadata: dict[str, Any]) -> None:
    """Refuse a vocabulary whose lists do not fit each other."""
    tokens = _count(metadata, "tokens")
    if not tokens:
        raise OptimError(f"{path} has no tokenizer inside", OWN, USAGE)
    for key in ("scores", "token_type"):
        if (found := _count(metadata, key)) is not None and found != tokens:
            damaged(path, f"tokenizer.ggml.{key} has {found} entries for {tokens} tokens")
    for role in ("bos", "eos"):
        token = metadata.get(f"tokenizer.ggml.{role}_token_id")
        if token is not None and not (type(token) is int and 0 <= token < tokens):
            damaged(path, f"its {role}_token_id is {token!r}, of {tokens} tokens")


def _count(metadata: dict[str, Any], key: str) -> int | None:
    """Length of one of the tokenizer's lists; None if it is not there."""
    values = metadata.get(f"tokenizer.ggml.{key}")
    if isinstance(values, LongArray):
        return values.count
    return len(values) if isinstance(values, list) else None


def _convert(path: Path, folder: Path, metadata: dict[str, Any], rule: Rule | None) -> None:
    """Write tokenizer.json and its companions for the vocabulary inside the GGUF file."""
    from transformers import PreTrainedTokenizerFast  # AutoTokenizer would ask for the model type
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        made = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
        made.save_pretrained(folder)
        backend: Any = made.backend_tokenizer
        if rule is not None:
            backend.pre_tokenizer = pre_tokenizer(rule)
            backend.model.ignore_merges = rule.whole_words
        backend.post_processor = _around(backend, metadata, rule)
        backend.save(str(folder / "tokenizer.json"))
    except Exception as error:  # transformers raises nearly anything on an unusual vocabulary
        message = f"transformers cannot use the tokenizer inside {path}: {error}"
        raise OptimError(message, OWN, USAGE) from None


def _around(backend: Tokenizer, metadata: dict[str, Any], rule: Rule | None) -> TemplateProcessing:
    """What is put around a text: the begin token, the end token, or nothing."""
    pieces = metadata.get("tokenizer.ggml.model") == PIECES
    begins = pieces if rule is None else rule.begin
    named: list[dict[str, Any]] = []
    for role, default in (("bos", begins), ("eos", False)):
        own = metadata.get(f"tokenizer.ggml.{role}_token_id", PIECES_IDS[role] if pieces else None)
        token = None if own is None else backend.id_to_token(own)
        if metadata.get(f"tokenizer.ggml.add_{role}_token", default) and token is not None:
            named.append({"id": role, "ids": [own], "tokens": [token]})
    used = {"$A", *(piece["id"] for piece in named)}
    form = [piece for piece in ("bos", "$A", "eos") if piece in used]
    return TemplateProcessing(single=form, special_tokens=named)


def _generation(metadata: dict[str, Any]) -> dict[str, Any]:
    """Begin and end tokens; a chat model's end of turn (`eot`) counts as an end too."""
    ids = {key: metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot")}
    ends = sorted({end for end in (ids["eos"], ids["eot"]) if isinstance(end, int)})
    made: dict[str, Any] = {"eos_token_id": ends[0] if len(ends) == 1 else ends}
    return made if ids["bos"] is None else {"bos_token_id": ids["bos"], **made}
