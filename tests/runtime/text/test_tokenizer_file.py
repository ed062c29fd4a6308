"""Tokenizers that came from anywhere: each is usable, or refused before it does harm."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.text import tokenizer_file
from optim.runtime.text.tokenizer_file import guarded, read_backend

MODEL = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}


def split(expression: str) -> dict[str, Any]:
    pattern = {"pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    return {"pre_tokenizer": {"type": "Split", **pattern}}


def charsmap(data: bytes) -> dict[str, Any]:
    text = base64.b64encode(data).decode()
    return {"normalizer": {"type": "Precompiled", "precompiled_charsmap": text}}


def template(count: int, name: str) -> dict[str, Any]:
    single = [{name: {"id": "A", "type_id": 0}}] * count
    whole = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
    return {"post_processor": whole}


DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
HOSTILE: dict[str, dict[str, Any]] = {
    "no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "no table": charsmap(b""),
    "a table of 4 GB": charsmap(b"\xff" * 1500),
    "a table that leads out": charsmap(b"\x08\0\0\0" + b"\xff" * 8 + b"abc"),
    "exponential": split(r"(a|a)*[0-9][x-z]"),
    "cubic": split(r"\w+\w+ [x-z]"),
    "no such token": template(1, "SpecialToken"),
    "the text 100,000 times": template(100_000, "Sequence"),
    "doubling": {"normalizer": {"type": "Sequence", "normalizers": [DOUBLE] * 20}},
    "strip": {"decoder": {"type": "Strip", "content": "a", "start": 2**40, "stop": 2**40}},
    "merges": {"model": MODEL | {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["ab", "a"]]}},
    "one word for two": {"model": MODEL | {"vocab": {"a": 0}, "merges": [["a", "b"]]}},
    "no model": {"model": None},
}


def written(folder: Path, changes: dict[str, Any]) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": MODEL} | changes))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPTIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tokenizer_is_refused(tmp_path: Path, name: str, cache: Path) -> None:
    with pytest.raises(OptimError, match=r"tokenizer\.json cannot be used") as caught:
        read_backend(written(tmp_path, HOSTILE[name]))
    assert caught.value.code == USAGE


@pytest.mark.parametrize("text", ["", "[]", '{"model"', "[" * 100_000, "\ud800"])
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(OptimError, match="cannot be used"):
        read_backend(path)


def test_steps_that_held_are_not_tried_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt4 = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s*[\r\n]+|\s+(?!\S)|\s+"
    path = written(tmp_path, split(gpt4))
    assert read_backend(path).encode("ab").ids == [0, 1]
    assert len(list((cache / "tokenizers").iterdir())) == 1
    monkeypatch.setattr(tokenizer_file, "_probe", lambda _: pytest.fail("tried again"))
    read_backend(path)


def test_a_pad_length_of_a_terabyte_is_not_used(tmp_path: Path) -> None:
    padding = {"strategy": {"Fixed": 2**40}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
    assert read_backend(written(tmp_path, {"padding": padding})).encode("ab").ids == [0, 1]


def test_a_panic_is_an_error_and_an_interrupt_is_not() -> None:
    class Panic(BaseException):
        pass

    def panic() -> None:
        raise Panic("index out of bounds\nbacktrace")

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(OptimError, match=r"this text: index out of bounds$"):
        guarded(panic, "this text")
    with pytest.raises(KeyboardInterrupt):
        guarded(interrupt, "this text")
