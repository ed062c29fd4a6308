"""Text to token ids and back: tokenizer, chat template, streaming.

`tokenizers` and a jinja sandbox are used directly where there is a tokenizer.json: importing
transformers costs seconds and 150 MB. Older vocabularies are converted by transformers.

Control tokens come from templates alone. If a document or a user types `<|im_end|>`, it is encoded
as the letters it is made of, so it cannot end a turn or open one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.architecture.config import text_part
from optim.runtime.system.files import load_json
from optim.runtime.text.chat_template import Message, chat_template, render_template
from optim.runtime.text.tokenizer_file import guarded, read_backend

PRIVATE_USE = range(0xE000, 0xF8FF)
LOST = "�"
LONE_HALF = re.compile("[\ud800-\udfff]")
MOST_TOKENS = 2**22
BELONG = "the tokenizer and the weights are of different models: fetch both again"
CHECK = "is it valid text, and tokenizer.json that of the model?"


@dataclass(slots=True)
class Tokenizer:
    """Encodes, decodes, renders chats; made by `load_tokenizer`."""

    backend: Backend = field(repr=False)
    template: str | None = field(repr=False)
    names: dict[str, str]
    """Special tokens by role, as templates name them: `bos_token`, `eos_token`, ..."""
    bos_id: int | None
    eos_ids: set[int]
    begin: tuple[int, ...] = field(init=False)
    """What the tokenizer puts in front of every text: BOS, or nothing."""
    begun: bool = False
    """Whether the model has those already, as an artifact's prefix: then none is put in front."""
    table: int | None = None
    """Rows of the model's embedding table: a token beyond them is refused."""
    _control: re.Pattern[str] = field(init=False, repr=False)
    _takes_system: bool | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        added = self.backend.get_added_tokens_decoder().values()
        control = sorted((t.content for t in added if t.special), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, control)) or r"(?!)")
        some = self._encoding("a", special=True)
        put = takewhile(lambda pair: pair[1], zip(some.ids, some.special_tokens_mask, strict=True))
        self.begin = tuple(token for token, _ in put)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token and its id."""
        found: dict[str, int] = self.backend.get_vocab(with_added_tokens=True)
        return found

    def as_json(self) -> str:
        """The tokenizer as a tokenizer.json has it.

        Raises OptimError (2) for an id that no vocabulary reaches: every gap below would be listed.
        """
        if (highest := max(self.vocabulary.values(), default=0)) > MOST_TOKENS:
            raise OptimError(f"tokenizer.json has a token {highest}", CHECK, USAGE)
        text: str = self.backend.to_str()
        return text

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be used."""
        return self.template is not None

    @property
    def takes_system(self) -> bool:
        """Whether the chat template has a place for a system message; without one there is none."""
        if self._takes_system is None:
            turns = [{"role": role, "content": "a"} for role in ("system", "user")]
            try:
                self.render(turns)
                self._takes_system = True
            except OptimError:
                self._takes_system = False
        return self._takes_system

    def _ids(self, text: str, special: bool, control: bool) -> list[int]:
        self.backend.encode_special_tokens = not control
        ids = list(self._encoding(text, special).ids)
        if self.table is not None and max(ids, default=0) >= self.table:
            token = self.backend.id_to_token(max(ids))
            what = f"the tokenizer gives {token!r} the number {max(ids)}"
            raise OptimError(f"{what}, the model's table has {self.table} rows", BELONG, USAGE)
        return ids

    def _encoding(self, text: str, special: bool) -> Encoding:
        what = "the tokenizer cannot encode this text"
        return guarded(lambda: self.backend.encode(text, add_special_tokens=special), what, CHECK)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of a text; with `special` also what the tokenizer puts around one (BOS).

        Control tokens typed in the text stay text.
        """
        ids = self._ids(text, special, control=False)
        return self.after_begin(ids) if special and self.begun else ids

    def after_begin(self, ids: list[int]) -> list[int]:
        """`ids` without what `begin` put in front of them."""
        count = len(self.begin)
        return ids[count:] if tuple(ids[:count]) == self.begin else ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        what = "the tokenizer cannot decode these tokens"
        return str(guarded(lambda: self.backend.decode(list(ids), skip_special), what, CHECK))

    def stream(self) -> "Stream":
        """A decoder that takes one id at a time."""
        return Stream(self)

    def render(
        self, messages: Sequence[Message], generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The chat as the template writes it. OptimError (2) if there is none or it refuses."""
        if self.template is None:
            fix = "it is a base model: give it a text to go on with, or take its -Instruct sibling"
            raise OptimError("this model has no chat template", fix, USAGE)
        settings = {"add_generation_prompt": generation_prompt, **self.names, **variables}
        return render_template(self.template, messages, settings)

    def chat(
        self, messages: Sequence[Message], generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Token ids of a chat; `variables` go to the template (`enable_thinking=False`).

        Raises OptimError (2) as `render` does.
        """
        if any(self._control.search(text) for text in _texts([list(messages), variables])):
            ids = self._guarded_chat(messages, generation_prompt, variables)
        else:
            text = self.render(messages, generation_prompt, **variables)
            ids = self._ids(text, special=False, control=True)
        return self.after_begin(ids) if self.begun else ids

    def _guarded_chat(
        self, messages: Sequence[Message], generation_prompt: bool, variables: dict[str, Any]
    ) -> list[int]:
        """`chat` for messages that contain control tokens.

        A mark is put inside each of them before rendering, so the control tokens found afterwards
        are the template's. The text between those is encoded piece by piece, as the tokenizer does.
        """
        typed = "".join(_texts([list(messages), variables]))
        mark = next(chr(code) for code in PRIVATE_USE if chr(code) not in typed)

        def split(value: Any) -> Any:
            if isinstance(value, str):
                return self._control.sub(lambda t: mark.join(t[0]), value)
            if isinstance(value, dict):
                return {split(key): split(item) for key, item in value.items()}
            return [split(item) for item in value] if isinstance(value, list) else value

        text = self.render(split(list(messages)), generation_prompt, **split(variables))
        ids, start = [], 0
        for found in self._control.finditer(text):
            ids += self._ids(text[start : found.start()].replace(mark, ""), False, control=False)
            ids += self._ids(found[0], False, control=True)
            start = found.end()
        return ids + self._ids(text[start:].replace(mark, ""), False, control=False)


def _texts(value: Any) -> list[str]:
    """All texts that are nested in lists and objects, their keys too."""
    if isinstance(value, dict):
        return [text for pair in value.items() for text in _texts(list(pair))]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else []


class Stream:
    """Text of ids that come one at a time; a character comes out when all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # from the last piece given out on: the context of its spaces
        self._done = 0  # how many of those have been given out

    def push(self, token: int) -> str:
        """The text that `token` completes; often empty."""
        self._ids.append(token)
        return self._take(final=False)

    def flush(self, cut: bool = False) -> str:
        """What is left at the end: an unfinished character as U+FFFD, none if the text is `cut`."""
        left = self._take(final=True)
        return left.rstrip(LOST) if cut else left

    def _take(self, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[: self._done])
        now = self._tokenizer.decode(self._ids)
        if len(now) <= len(before) or (now.endswith(LOST) and not final):
            return ""
        self._ids = self._ids[self._done :]
        self._done = len(self._ids)
        return now[len(before) :]


def _json(path: Path) -> dict[str, Any]:
    return load_json(path) if path.is_file() else {}


def _names(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Special tokens by role; each is a string or an object with its `content`."""
    found = {}
    for role, token in (_json(folder / "special_tokens_map.json") | settings).items():
        value = token.get("content") if isinstance(token, dict) else token
        if role.endswith("_token") and isinstance(value, str):
            if LONE_HALF.search(value):
                raise OptimError(f"{folder}: its {role} has half a character", BELONG, USAGE)
            found[role] = value
    return found


def _numbers(places: list[dict[str, Any]], key: str) -> list[int]:
    values = [place.get(key) for place in places]
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return [item for item in flat if type(item) is int]


def _converted(folder: Path, trust_remote_code: bool) -> tuple[Backend, dict[str, str]]:
    """Tokenizer and special tokens of a folder without tokenizer.json, through transformers."""
    from transformers import AutoTokenizer

    fix = "add the model's tokenizer.json to the folder"
    made: Any = guarded(
        lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code),
        f"{folder} has no usable tokenizer",
        fix,
    )
    if getattr(made, "backend_tokenizer", None) is None:
        raise OptimError(f"{folder}: its tokenizer exists as Python code only", fix, USAGE)
    return made.backend_tokenizer, {role: str(t) for role, t in made.special_tokens_map.items()}


def load_tokenizer(
    folder: Path, config: dict[str, Any], *, trust_remote_code: bool = False
) -> Tokenizer:
    """The tokenizer of a model folder; `config` is its config.json.

    Raises OptimError (2) if there is none or it cannot be read.
    """
    settings = _json(folder / "tokenizer_config.json")
    names = _names(folder, settings)
    if (folder / "tokenizer.json").is_file():
        backend = read_backend(folder / "tokenizer.json")
    else:
        backend, names = _converted(folder, trust_remote_code)
    backend.no_truncation()
    backend.no_padding()
    places = [config, text_part(config), _json(folder / "generation_config.json")]
    bos_id = backend.token_to_id(names["bos_token"]) if "bos_token" in names else None
    if "bos_token" not in settings and bos_id is None:
        bos_id = next(iter(_numbers(places, "bos_token_id")), None)
    eos_id = backend.token_to_id(names["eos_token"]) if "eos_token" in names else None
    eos_ids = set(_numbers(places, "eos_token_id")) | ({eos_id} if eos_id is not None else set())
    return Tokenizer(backend, chat_template(folder, settings), names, bos_id, eos_ids)
