"""The tokenizer inside a GGUF file: cuts, begin and end, refusals; llama.cpp as the judge."""

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from optim.recipes.errors import OptimError
from optim.runtime.storage.gguf.pre_tokenizers import RULES
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.text.tokenizer import Tokenizer

Fill = Callable[[gguf.GGUFWriter], None]
BYTES = sorted(ByteLevel.alphabet())
WIDE = [letter for letter in BYTES if ord(letter) > 126 and letter not in "ĠĊĉč"]
NARROW = [letter for letter in BYTES if letter not in WIDE]
# Every pair of neighbours merges, so that each cut shows in the ids.
PAIRS = [(a, b) for kind in (NARROW, WIDE) for a in kind for b in kind]
TOKENS = ["<s>", "</s>", *BYTES, *(a + b for a, b in PAIRS), "123"]
TEXTS = (
    "1234 and 12345, 1234567 b's it'S I'LL don't\n\n  x\t\ty \r\n z",
    "HelloWorld fooBar  --- != <=> $x^2 `code` ~|",
    "日本語のテキスト 中文 한국어 текст Ünï ა",
    "   leading and trailing   ",
    "price: $1,234.56 (approx.)\n \n",
)
# A name of each rule; DeepSeek LLM's digits are cut as its authors do, see the table.
NAMES = [names.split()[0] for names in RULES if names != "deepseek-llm"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTIM_CACHE", str(tmp_path / "cache"))


def write(path: Path, fill: Fill, tokens: int = len(TOKENS)) -> Path:
    """A model of one block; `fill` writes its tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(16)
    fill(writer)
    square = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    shapes = {f"blk.0.{name}": (32, 32) for name in square}
    shapes |= {"token_embd": (tokens, 32), "output_norm": (32,)}
    shapes |= {"blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level(pre: str | None, **keys: bool) -> Fill:
    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(TOKENS)
        writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
        writer.add_token_merges([f"{a} {b}" for a, b in PAIRS])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        for key, value in keys.items():
            writer.add_bool(f"tokenizer.ggml.{key}", value)

    return fill


def pieces(writer: gguf.GGUFWriter) -> None:
    """SentencePiece's kind: a space is ▁, bytes have names."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁ab"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*tokens, "ab"])
    writer.add_token_scores([0.0] * len(tokens) + [-1.0])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * 5])


def opened(path: Path) -> Tokenizer:
    return open_checkpoint(str(path)).tokenizer()


def words(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([i], skip_special=False) for i in tokenizer.encode(text, special=True)]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["1", "2", "3", "4"]),
        ("starcoder", ["1", "2", "3", "4"]),
        ("deepseek-llm", ["1", "2", "3", "4"]),
        ("gpt-2", ["12", "34"]),
        ("default", ["12", "3", "4"]),  # merges before whole words
        ("llama-bpe", ["<s>", "123", "4"]),  # a whole word of the vocabulary, whatever the merges
        ("tekken", ["<s>", "1", "2", "3", "4"]),
        (None, ["12", "3", "4"]),
    ],
)
def test_numbers_are_cut_as_the_file_says(
    pre: str | None, expected: list[str], tmp_path: Path
) -> None:
    tokenizer = opened(write(tmp_path / "m.gguf", byte_level(pre)))
    assert words(tokenizer, "1234") == expected
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_what_the_file_says_of_bos_and_eos_is_done(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    silent = opened(write(path, byte_level("llama-bpe", add_bos_token=False)))
    assert words(silent, "a") == ["a"]
    both = opened(write(path, byte_level("gpt-2", add_bos_token=True, add_eos_token=True)))
    assert words(both, "a") == ["<s>", "a", "</s>"]


def test_sentence_pieces_begin_with_bos_unless_told_otherwise(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", pieces, 264)
    assert opened(path).encode("ab", special=True)[0] == 1

    def silent(writer: gguf.GGUFWriter) -> None:
        pieces(writer)
        writer.add_add_bos_token(False)

    write(path, silent, 264)
    assert 1 not in opened(path).encode("ab", special=True)


def test_an_unknown_way_of_cutting_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", byte_level("tomorrow"))
    with pytest.raises(OptimError, match="'tomorrow'") as caught:
        opened(path)
    assert caught.value.code == 2
    assert "tokenizer.json" in str(caught.value.fix)


def test_lists_of_other_lengths_are_refused(tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        byte_level("gpt-2")(writer)
        writer.add_token_scores([0.0] * 7)

    with pytest.raises(OptimError, match="scores has 7 entries"):
        opened(write(tmp_path / "m.gguf", fill))


def test_a_begin_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        byte_level("gpt-2")(writer)
        writer.add_eos_token_id(1 << 30)

    with pytest.raises(OptimError, match="eos_token_id is"):
        opened(write(tmp_path / "m.gguf", fill))


@pytest.mark.slow
@pytest.mark.parametrize("pre", NAMES)
def test_every_rule_cuts_as_llama_cpp_does(pre: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("xllamacpp", reason="`pip install optim-llm[peers]`")
    path = write(tmp_path / "m.gguf", byte_level(pre))
    options = llama_cpp.CommonParams()
    options.model.path, options.n_ctx, options.n_gpu_layers = str(path), 64, 0
    options.warmup, options.cpuparams.n_threads, options.verbosity = False, 1, -1
    server = llama_cpp.Server(options)
    tokenizer = opened(path)
    for text in TEXTS:
        assert tokenizer.encode(text, special=True) == _asked(server, text), text


def _asked(server: Any, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": True, "parse_special": False}).encode()
    head = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, head)
    with urllib.request.urlopen(request) as answer:
        return list(json.load(answer)["tokens"])
