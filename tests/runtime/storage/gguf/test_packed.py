"""GGUF weights that stay packed: the integers of the file, run as its floats are."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from optim.runtime.engine.load import load_model
from optim.runtime.kernels.door import Array
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.dense_view import PlainView
from optim.runtime.storage.gguf.packed import with_integers
from optim.runtime.storage.gguf.store import GgufStore
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.storage.tensors import Part
from tests.runtime.storage.gguf.test_store import llama_rows, write

KINDS = [gguf.GGMLQuantizationType[n] for n in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")]


def name_of(kind: gguf.GGMLQuantizationType) -> str:
    return kind.name


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_packed_weights_are_those_of_the_gguf_package(
    kind: gguf.GGMLQuantizationType, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    write(tmp_path / "m.gguf", tiny_llama, "llama", kind=kind, change=llama_rows(tiny_llama))
    view = PlainView(with_integers(open_checkpoint(str(tmp_path / "m.gguf"))))
    packed = [name for name in view.tensors if view.scheme(name) is not None]
    assert len(packed) == 2 * 7 + 2  # the embedding and the head as well
    for name in packed:  # rounding works row by row, so rows may be turned before or after it
        rounded = gguf.quants.quantize(tiny_llama.state_dict()[name].numpy(), kind)
        wanted = torch.from_numpy(np.array(gguf.quants.dequantize(rounded, kind)))
        torch.testing.assert_close(view.read(name), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_it_runs_as_its_floats_run(
    kind: gguf.GGMLQuantizationType, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    write(path, tiny_llama, "llama", kind=kind, change=llama_rows(tiny_llama))
    packed, wide = load_model(str(path)), load_model(str(path), form="bf16")
    ids = torch.arange(2, 40)[None]
    got, wanted = (m.forward(ids, m.new_cache(), all_logits=True) for m in (packed, wide))
    assert float((got - wanted).norm() / wanted.norm()) < 0.03
    assert packed.weight_bytes < wide.weight_bytes * 0.7


def test_other_types_are_read_as_before(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", tiny_llama, "llama", kind=gguf.GGMLQuantizationType.F16)
    checkpoint = open_checkpoint(str(tmp_path / "m.gguf"))
    assert with_integers(checkpoint) is checkpoint


def test_the_demo_keeps_every_weight(demo: Checkpoint) -> None:
    """Its floats are bf16; its integers stand for what those were rounded from."""
    view = PlainView(with_integers(demo))
    for name in ("model.embed_tokens.weight", "model.layers.3.self_attn.k_proj.weight"):
        assert view.scheme(name) is not None
        assert torch.equal(view.read(name).bfloat16(), demo.read(name))


def test_a_linear_is_read_from_the_file_once(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = gguf.GGMLQuantizationType.Q4_1
    write(tmp_path / "m.gguf", tiny_llama, "llama", kind=kind, change=llama_rows(tiny_llama))
    checkpoint = with_integers(open_checkpoint(str(tmp_path / "m.gguf")))
    read: list[str] = []
    inner = GgufStore.raw

    def raw(store: GgufStore, name: str) -> Array:
        read.append(name)
        return inner(store, name)

    monkeypatch.setattr(GgufStore, "raw", raw)
    stem = "model.layers.0.mlp.up_proj.weight"
    parts = [checkpoint.read(f"{stem}_{key}") for key in ("packed", "scale", "offset")]
    assert read == [stem]
    again = [checkpoint.read(f"{stem}_{key}") for key in ("offset", "packed", "scale")]
    assert all(map(torch.equal, again, (parts[2], parts[0], parts[1])))
    some = checkpoint.store.read(Part(f"{stem}_scale", rows=(1, 3)))
    assert torch.equal(some, parts[1][1:3])
