"""The tokenizer inside a GGUF file: copied from a GGUF source, or made from a tokenizer.json.

Two kinds are known to every runtime. `gpt2` is byte-level BPE: vocabulary, merges, and the name of
the rule that cuts text (`pre`). `llama` is SentencePiece and what has `byte_fallback`: pieces with
scores. A rule is found by comparing what tokenizer.json does with the table that GGUF files are
read by (storage/gguf/pre_tokenizers.py), never guessed.
"""

import json
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFValueType as Type
from gguf import TokenType

from optim.export.exporter import refuse
from optim.recipes.errors import USAGE, OptimError
from optim.runtime.storage.companions import TOKENIZER, companions
from optim.runtime.storage.dense_view import PlainView
from optim.runtime.storage.gguf.pre_tokenizers import BY_NAME, GPT2, Rule
from optim.runtime.storage.gguf.tokenizer import BYTE_LEVEL, PIECES
from optim.runtime.system.files import damaged, load_json
from optim.runtime.text.chat_template import other_templates
from optim.runtime.text.tokenizer import Tokenizer

Pairs = dict[str, tuple[Any, Type, Type | None]]
"""Key -> value, its type, the type of an array's entries."""
OWN_FIELDS = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")
ADDED, PIECE_BYTE = -1000.0, re.compile(r"<0x[0-9A-F]{2}>")
BLANK = "\u2581"  # SentencePiece's blank
UNNAMED = re.compile(r"[^A-Za-z0-9_-]")
MARKED = re.compile(r"<\|.*\|>")
SAY = "--pre NAME says which rule cuts the text, one of: " + ", ".join(BY_NAME)


def gguf_source(model: PlainView) -> Path | None:
    """The GGUF file that the model is read from, if it is."""
    files = model.checkpoint.store.files
    return files[0] if len(files) == 1 and files[0].suffix == ".gguf" else None


def copied(path: Path) -> Pairs:
    """Every key of a GGUF file but those that say how its tensors are stored."""
    try:
        fields = gguf.GGUFReader(path).fields.values()
        return {
            field.name: (
                field.contents(),
                field.types[0],
                field.types[-1] if field.types[0] == Type.ARRAY else None,
            )
            for field in fields
            if not field.name.startswith(OWN_FIELDS)
        }
    except Exception as error:  # the package raises what numpy does
        damaged(path, f"its keys cannot be copied ({error})")


def made(model: PlainView, rows: int, pre: str | None) -> Pairs:
    """The keys of a model's tokenizer, for an embedding table of `rows`.

    Raises OptimError (2) for a tokenizer that has no place in the format, or whose way of cutting
    text is not in the table; `pre` names it then.
    """
    if pre is not None and pre not in BY_NAME:
        raise OptimError(f"--pre {pre}: there is no such rule", SAY, USAGE)
    folder = model.checkpoint.folder
    if not any(fnmatchcase(n, p) for n in companions(folder) for p in TOKENIZER):
        return {"tokenizer.ggml.model": ("none", Type.STRING, None)}
    tokenizer = model.checkpoint.tokenizer()
    facts = json.loads(tokenizer.as_json())
    kind = _kind(model, facts)
    pairs: Pairs = {"tokenizer.ggml.model": (kind, Type.STRING, None)}
    name = pre or (_rule_name(model, facts, bool(tokenizer.begin)) if kind == BYTE_LEVEL else None)
    pairs["tokenizer.ggml.pre"] = (name or "default", Type.STRING, None)
    pairs |= _vocabulary(model, facts, rows, kind)
    pairs |= _ids(tokenizer)
    if kind == PIECES:
        space = _prepends(facts)
        pairs["tokenizer.ggml.add_space_prefix"] = (space, Type.BOOL, None)
    if tokenizer.template is not None:
        pairs["tokenizer.chat_template"] = (tokenizer.template, Type.STRING, None)
    return pairs | _other_templates(folder)


def _other_templates(folder: Path) -> Pairs:
    """Chat templates beside the default one, each under a key that has its name."""
    path = folder / "tokenizer_config.json"
    found = other_templates(folder, load_json(path) if path.is_file() else {})
    if not found:
        return {}
    named = {UNNAMED.sub("_", name): template for name, template in found.items()}
    pairs: Pairs = {"tokenizer.chat_templates": (list(named), Type.ARRAY, Type.STRING)}
    return pairs | {
        f"tokenizer.chat_template.{name}": (template, Type.STRING, None)
        for name, template in named.items()
    }


def _kind(model: PlainView, facts: dict[str, Any]) -> str:
    bpe = facts["model"]
    kind = bpe.get("type")
    if kind == "BPE" and bpe.get("byte_fallback"):
        return PIECES
    if kind == "BPE" and any(step["type"] == "ByteLevel" for step in _steps(facts)):
        return BYTE_LEVEL
    why = f"its tokenizer is of the kind {kind}, and GGUF has byte-level BPE and SentencePiece"
    raise refuse(model, why, "export it as safetensors")


def _steps(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps before the vocabulary, in order."""
    step = facts.get("pre_tokenizer")
    if step is None:
        return []
    return list(step["pretokenizers"]) if step["type"] == "Sequence" else [step]


def _cuts(facts: dict[str, Any]) -> Iterator[str | None]:
    """What each step cuts by; None for a step that is no cut of the table's kind."""
    for step in _steps(facts):
        kind = step["type"]
        if kind == "ByteLevel":
            yield from [GPT2] if step.get("use_regex", True) else []
            if step.get("add_prefix_space"):
                yield None
        elif kind == "Digits":
            yield r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
        elif kind == "Split" and _keeps(step):
            pattern = step["pattern"]
            yield pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"])
        else:
            yield None


def _keeps(step: dict[str, Any]) -> bool:
    """Whether a split keeps what matches, and what lies between, as pieces."""
    behavior, invert = step.get("behavior"), bool(step.get("invert"))
    return behavior == "Isolated" or (behavior == "Removed" and invert)


def _rule_name(model: PlainView, facts: dict[str, Any], begins: bool) -> str:
    """The first name of the rule that cuts as this tokenizer does."""
    cuts, whole = tuple(_cuts(facts)), bool(facts["model"].get("ignore_merges"))
    found: dict[str, Rule] = {
        name: rule
        for name, rule in BY_NAME.items()
        if rule.cuts == cuts and rule.whole_words == whole
    }
    alike = [name for name, rule in found.items() if rule.begin == begins]
    if not found:
        why = "its tokenizer cuts text by a rule that is none of GGUF's"
        raise refuse(model, why, SAY)
    return (alike or list(found))[0]


def _vocabulary(model: PlainView, facts: dict[str, Any], rows: int, kind: str) -> Pairs:
    """Tokens, types and what ranks them: one entry for each row of the embedding table."""
    vocab, bpe = facts["model"]["vocab"], facts["model"]
    added = {token["id"]: token for token in facts.get("added_tokens", [])}
    words = {number: word for word, number in vocab.items()}
    words |= {number: token["content"] for number, token in added.items()}
    tokens = [words.get(i, f"[PAD{i}]") for i in range(rows)]
    if len(set(tokens)) < rows:
        twice = next(t for t in tokens if tokens.count(t) > 1)
        raise refuse(model, f"two of its tokens are {twice!r}", "correct tokenizer.json")
    unknown = bpe.get("unk_token")

    def kind_of(i: int) -> TokenType:
        if i not in words:
            return TokenType.UNUSED
        if words[i] == unknown:
            return TokenType.UNKNOWN
        if i in added:
            control = added[i]["special"] or MARKED.fullmatch(words[i])
            return TokenType.CONTROL if control else TokenType.USER_DEFINED
        if kind == PIECES and PIECE_BYTE.fullmatch(words[i]):
            return TokenType.BYTE
        return TokenType.NORMAL

    types = [int(kind_of(i)) for i in range(rows)]
    pairs: Pairs = {
        "tokenizer.ggml.tokens": (tokens, Type.ARRAY, Type.STRING),
        "tokenizer.ggml.token_type": (types, Type.ARRAY, Type.INT32),
    }
    if kind == PIECES:
        scores = [ADDED if i in added else -float(i) for i in range(rows)]
        return pairs | {"tokenizer.ggml.scores": (scores, Type.ARRAY, Type.FLOAT32)}
    merges = [_merge(m) for m in bpe["merges"]]
    return pairs | {"tokenizer.ggml.merges": (merges, Type.ARRAY, Type.STRING)}


def _merge(pair: Any) -> str:
    """The two parts with a blank between them; a blank inside a part is written as bytes are."""
    if isinstance(pair, str):
        return pair
    return " ".join(part.replace(" ", "\u0120") for part in pair)


def _ids(tokenizer: Tokenizer) -> Pairs:
    """The numbers of the special tokens, and what is put around a text."""
    roles = {"unknown": "unk_token", "padding": "pad_token", "eos": "eos_token"}
    texts = {role: tokenizer.names.get(name) for role, name in roles.items()}
    found = {role: tokenizer.backend.token_to_id(text) for role, text in texts.items() if text}
    ends = sorted(tokenizer.eos_ids)
    if found.get("eos") is None and ends:
        found["eos"] = ends[0]
    others = [end for end in ends if end != found.get("eos")]
    found |= {"bos": tokenizer.bos_id, "eot": others[0] if others else None}
    pairs: Pairs = {
        f"tokenizer.ggml.{role}_token_id": (number, Type.UINT32, None)
        for role, number in found.items()
        if number is not None
    }
    begins = bool(tokenizer.begin) and tokenizer.begin[0] == tokenizer.bos_id
    around = tokenizer.encode("a", special=True)
    ended = len(around) > len(tokenizer.begin) + 1 and around[-1] in tokenizer.eos_ids
    pairs["tokenizer.ggml.add_bos_token"] = (begins, Type.BOOL, None)
    pairs["tokenizer.ggml.add_eos_token"] = (ended, Type.BOOL, None)
    return pairs


def _prepends(facts: dict[str, Any]) -> bool:
    """Whether a blank is put in front of a text."""
    steps = [facts.get("normalizer") or {}, *_steps(facts)]
    inner = [part for step in steps for part in step.get("normalizers", [])]
    prepends = any(
        step.get("type") == "Prepend" and step.get("prepend") == BLANK for step in steps + inner
    )
    schemes = {s.get("prepend_scheme") for s in steps if s.get("type") == "Metaspace"}
    return prepends or bool(schemes & {"always", "first"})
