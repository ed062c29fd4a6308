"""What a GGUF file's head may claim: bounded, and refused with the name of what is wrong."""

import resource
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from optim.recipes.errors import OptimError
from optim.runtime.storage.gguf.file import SHORT, LongArray, read_header
from optim.runtime.storage.open import open_checkpoint

Change = Callable[[gguf.GGUFWriter], None]


def head(pairs: int = 0, tensors: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + rest


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name: str, dims: tuple[int, ...], kind: int = 0, begin: int = 0) -> bytes:
    dimensions = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + dimensions + struct.pack("<IQ", kind, begin)


def refused(path: Path, why: str) -> None:
    with pytest.raises(OptimError, match=why) as caught:
        open_checkpoint(str(path))
    assert caught.value.code == 2


HEADS = {
    "not GGUF": (b"GGML" + bytes(40), "not GGUF"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "not GGUF version"),
    "too many tensors": (head(tensors=2**60), "more entries than it has bytes"),
    "a key that never ends": (head(1, 0, struct.pack("<Q", 2**62)), "a string of"),
    "a key past the end": (head(1, 0, struct.pack("<Q", 2**20)), "beyond the end"),
    "too many floats": (head(1, 0, text("k") + struct.pack("<IIQ", 9, 6, 2**50)), "an array of"),
    "too few floats": (head(1, 0, text("k") + struct.pack("<IIQ", 9, 6, 2**16)), "beyond the end"),
    "too few strings": (head(1, 0, text("k") + struct.pack("<IIQ", 9, 8, 9999)), "beyond the end"),
    "arrays of arrays": (head(1, 0, text("k") + struct.pack("<IIQ", 9, 9, 2)), "metadata type 9"),
    "unknown type": (head(1, 0, text("k") + struct.pack("<I", 77)), "metadata type 77"),
    "a key twice": (head(2, 0, 2 * (text("twin") + struct.pack("<II", 4, 1))), "twin is given"),
    "unknown kind": (head(0, 1, tensor("t", (32,), 999)), "999"),
    "half a block": (head(0, 1, tensor("odd", (33,), 2)), r"odd has dimensions"),
    "no rows": (head(0, 1, tensor("none", (32, 0))), r"none has dimensions"),
    "no columns": (head(0, 1, tensor("none", (0, 1 << 62))), r"none has dimensions"),
    "five dimensions": (head(0, 1, tensor("deep", (1,) * 5)), r"deep has dimensions"),
    "a tensor twice": (head(0, 2, 2 * tensor("twin", (32,))), "twin is given twice"),
    "one over another": (head(0, 2, tensor("a", (32,)) + tensor("b", (32,))), "b begins at 0"),
    "a hole": (head(0, 1, tensor("a", (32,), begin=64)), "a begins at 64"),
    "no data": (head(0, 1, tensor("long", (1 << 40,))), "long reaches beyond the end"),
    "alignment": (head(1, 0, text("general.alignment") + struct.pack("<II", 4, 3)), "alignment"),
}


@pytest.mark.parametrize("case", HEADS)
def test_hostile_heads(case: str, tmp_path: Path) -> None:
    written, why = HEADS[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(written)
    refused(path, why)


@pytest.mark.parametrize("kind", [0, 8])
def test_a_head_of_no_real_bytes_costs_no_memory(kind: int, tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    with path.open("wb") as file:
        file.write(head(1, 0, text("a") + struct.pack("<IIQ", 9, kind, 1 << 27)))
        file.truncate(1 << 28 << (3 * (kind == 8)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path, "an array of 134217728")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 64 << 10  # KiB


def test_many_arrays_are_bounded_together(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    array = struct.pack("<IIQ", 9, 0, 1 << 22)
    with path.open("wb") as file:
        file.write(head(40))
        for k in range(40):
            file.write(text(f"a{k}") + array)
            file.seek(1 << 22, 1)
        file.truncate(file.tell())
    refused(path, "its head is larger")


def test_long_arrays_are_stepped_over(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    words = ["x" * (k % 90) for k in range(SHORT + 1)]
    strings = struct.pack("<IIQ", 9, 8, len(words)) + b"".join(map(text, words))
    short = struct.pack("<IIQ", 9, 8, 2) + text("en") + text("de")
    number = struct.pack("<IQ", 10, 7)
    pairs = text("words") + strings + text("languages") + short + text("last") + number
    path.write_bytes(head(3, 0, pairs))
    metadata, table, _ = read_header(path)
    assert metadata == {"words": LongArray(SHORT + 1), "languages": ["en", "de"], "last": 7}
    assert table == {}


def write(path: Path, change: Change, blocks: int = 1) -> Path:
    """A llama of one block without a tokenizer, changed."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-6)
    for name in ("token_embd", "output_norm", "blk.0.attn_q", "blk.0.ffn_norm"):
        shape = (32,) if "norm" in name else (32, 32)
        writer.add_tensor(f"{name}.weight", np.ones(shape, dtype=np.float32))
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


ONES = np.ones(32, dtype=np.float32)
CHANGES: dict[str, tuple[Change, str]] = {
    "a norm of another family": (
        lambda w: w.add_tensor("blk.0.post_attention_norm.weight", ONES),
        "post_attention_norm.weight is unknown in llama",
    ),
    "a name that begins like a table": (
        lambda w: w.add_tensor("rope_f", ONES),
        "rope_f is unknown",
    ),
    "a word for a number": (
        lambda w: w.add_string("llama.rope.freq_base", "fast"),
        "llama.rope.freq_base is 'fast', where a number",
    ),
    "an endless number": (
        lambda w: w.add_float32("llama.rope.freq_base", float("inf")),
        "freq_base is inf",
    ),
    "layers that differ": (
        lambda w: w.add_head_count_kv([1, 2]),
        r"head_count_kv is \[1, 2\]",
    ),
    "a block without number two": (
        lambda w: w.add_tensor("blk.7.attn_q.weight", ONES),
        "the tensors of 2 blocks, its block_count is 1",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_model_that_does_not_fit_itself(case: str, tmp_path: Path) -> None:
    change, why = CHANGES[case]
    refused(write(tmp_path / "x.gguf", change), why)


def test_more_blocks_than_tensors(tmp_path: Path) -> None:
    refused(write(tmp_path / "x.gguf", lambda w: None, 2**32 - 1), "block_count is 4294967295")
