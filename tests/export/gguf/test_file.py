"""GGUF files of artifacts: weights as the integers stand for, the tokenizer, what is refused."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from optim.cli import main
from optim.export.gguf import tokenizer as tokens
from optim.export.gguf.blocks import carrier
from optim.export.gguf.families import gguf_name, row_of
from optim.export.run import export, plan
from optim.quant.run import plan as quantization
from optim.quant.run import quantize
from optim.recipes.build import build_recipe
from optim.recipes.errors import OptimError
from optim.recipes.schema import Export
from optim.runtime.storage.dense_view import PlainView
from optim.runtime.storage.gguf.file import read_header
from optim.runtime.storage.gguf.pre_tokenizers import BY_NAME, pre_tokenizer
from optim.runtime.storage.gguf.store import INTERLEAVED, NORM_PLUS_ONE, deinterleave
from optim.runtime.storage.open import open_checkpoint

Make = Callable[..., Path]
OLD = Path(__file__).parents[2] / "data" / "artifacts"
TEXT = "Hello don't WON'T 12345 | 3.14\n\n  x\tÜber 日本語 <|im_end|> 🙂"

WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


def run(*words: object) -> int:
    with pytest.MonkeyPatch.context() as patch, open(os.devnull) as nothing:
        patch.setattr(sys, "stdin", nothing)
        patch.setattr(sys, "argv", ["optim", "export", *map(str, words), "--quiet"])
        return main()


def written(source: Path | str, out: Path, **keys: Any) -> Path:
    export(plan(str(source), Export(format="gguf", **keys), str(out)), lambda *_: None)
    return out


def read(file: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Type and values of each tensor, by gguf's own reader and de-quantizer."""
    return {
        tensor.name: (
            tensor.tensor_type.name,
            np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)),
        )
        for tensor in gguf.GGUFReader(file).tensors
    }


# Q4_1 holds -z s in fp16: at most 0.0073 steps off, for scales of at most 1.
@pytest.mark.parametrize(
    ("name", "kind", "steps"),
    [
        ("rtn4-sym", "Q4_0", 0.0),
        ("awq8-sym", "Q8_0", 0.0),
        ("awq4", "Q4_1", 0.0074),
        ("awq3", "Q4_1", 0.0074),
    ],
)
def test_weights_are_what_the_integers_stand_for(
    name: str, kind: str, steps: float, make_model: Make, tmp_path: Path
) -> None:
    source = OLD / name
    if name == "rtn4-sym":
        source = tmp_path / name
        keys = {"quantize.method": "rtn", "quantize.group_size": 32, "quantize.sym": True}
        keys |= {"model": str(make_model("granite")), "output": str(source)}
        quantize(quantization(build_recipe(flags=keys)), lambda *_: None)
    view = PlainView(open_checkpoint(str(source)))
    found = read(written(source, tmp_path / "out.gguf"))
    arch, settings = row_of(view).arch, view.checkpoint.settings
    turned = {"q_proj": settings.num_attention_heads, "k_proj": settings.num_key_value_heads}
    packed = [tensor for tensor in view.tensors if carrier_of(view, tensor) is not None]
    assert packed
    for ours in packed:
        got, values = found[str(gguf_name(ours, arch))]
        w, heads = torch.from_numpy(values), turned.get(ours.split(".")[-2])
        w = deinterleave(w, heads) if heads and arch in INTERLEAVED else w
        q, scale, *_ = view.integers(ours)
        each = scale.float().repeat_interleave(q.shape[1] // scale.shape[1], 1)
        assert got == kind
        assert float(((w - view.read(ours)).abs() / each).max()) <= steps, ours
    norm = torch.from_numpy(found["output_norm.weight"][1])
    assert torch.equal(norm, view.read("model.norm.weight").float() + (arch in NORM_PLUS_ONE))


def carrier_of(view: PlainView, tensor: str) -> Any:
    return carrier(view.scheme(tensor), view.info(tensor).shape[-1])


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_blocks_of_a_file_stay_what_they_are(kind: str, make_model: Make, tmp_path: Path) -> None:
    first = written(make_model("llama"), tmp_path / "first.gguf", type=kind)
    shutil.copy(make_model("llama") / "tokenizer.json", tmp_path)
    made = plan(str(first), Export(format="gguf"), str(tmp_path / "second.gguf"))
    export(made, lambda *_: None)
    before, after = (
        {t.name: (t.tensor_type, bytes(t.data)) for t in gguf.GGUFReader(tmp_path / name).tensors}
        for name in ("first.gguf", "second.gguf")
    )
    assert before == after
    read = [row for row in made.as_dict()["weights"] if "as it is read" in row["change"]]
    assert read == []


@pytest.mark.parametrize("kind", ["f16", "q4_0"])
def test_weights_beyond_sixteen_bits_are_refused(
    kind: str, make_model: Make, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(make_model("llama"), tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e30
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(OptimError, match=r"up_proj.weight has a weight of 1e\+30"):
        written(folder, tmp_path / "m.gguf", type=kind)
    assert not (tmp_path / "m.gguf").exists()


def test_experts_go_into_stacks(tmp_path: Path) -> None:
    view = PlainView(open_checkpoint(str(OLD / "awq4-mixture")))
    found = read(written(OLD / "awq4-mixture", tmp_path / "out.gguf"))
    kind, stack = found["blk.0.ffn_up_exps.weight"]
    assert kind in ("Q4_0", "Q4_1") and found["blk.0.ffn_gate_inp.weight"][0] == "F32"
    for number, w in enumerate(stack):
        name = f"model.layers.0.mlp.experts.{number}.up_proj.weight"
        _, scale, *_ = view.integers(name)
        assert (torch.from_numpy(w) - view.read(name)).abs().max() <= 0.0074 * scale.max()


@pytest.mark.parametrize(
    ("kind", "sizes", "kinds"),
    [
        ("iq4_nl", {}, {"IQ4_NL", "Q8_0", "F32"}),
        ("q4_k", {}, {"Q5_0", "Q8_0", "F32"}),  # no input is a multiple of 256
        *((kind, WIDE, {kind.upper(), "Q8_0", "F32"}) for kind in ("q2_k", "q3_k", "q4_k", "q5_k")),
        ("q6_k", WIDE, {"Q6_K", "F32"}),
    ],
)
def test_a_plain_model_is_rounded_into_the_blocks_of_any_type(
    kind: str, sizes: dict[str, int], kinds: set[str], make_model: Make, tmp_path: Path
) -> None:
    folder = make_model("llama", **sizes)
    found = read(written(folder, tmp_path / "out.gguf", type=kind))
    assert {name for name, _ in found.values()} == kinds
    view = PlainView(open_checkpoint(str(folder)))
    for theirs, ours in (("ffn_up", "up_proj"), ("ffn_down", "down_proj")):
        name, w = found[f"blk.0.{theirs}.weight"]
        wanted = view.read(f"model.layers.0.mlp.{ours}.weight").float().numpy()
        bits = int(name.strip("IQ")[0])
        assert np.abs(w - wanted).max() <= np.abs(wanted).max() * 2.5 / 2**bits


def test_what_no_block_holds_is_told(make_model: Make, tmp_path: Path) -> None:
    made = plan(str(OLD / "awq8"), Export(format="gguf"), str(tmp_path / "x.gguf"))
    told = [row for row in made.as_dict()["weights"] if "8-bit" in row["from"]]
    assert told and all("no block holds" in row["change"] for row in told)
    small = Export(format="gguf", type="q4_0")
    rows = plan(str(make_model("llama")), small, str(tmp_path / "x.gguf")).as_dict()["weights"]
    assert {row["to"] for row in rows} == {"Q4_0", "Q8_0", "F32"}  # head and embeddings: Q8_0
    assert {row["change"] for row in rows if row["to"] == "Q4_0"} == {"rounded anew"}


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "smollm", "gpt-2", "dbrx", "tekken"])
def test_the_rule_that_cuts_is_found(name: str, make_model: Make, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = tmp_path / "model"
    shutil.copytree(make_model("llama"), folder)
    made: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.pre_tokenizer = pre_tokenizer(BY_NAME[name])
    made.model.ignore_merges = BY_NAME[name].whole_words
    made.save(str(folder / "tokenizer.json"))
    metadata, _, _ = read_header(written(folder, tmp_path / "out.gguf"))
    assert BY_NAME[metadata["tokenizer.ggml.pre"]].cuts == BY_NAME[name].cuts


def test_named_chat_templates_go_along(make_model: Make, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_model("llama"), tmp_path / "model"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    listed = [{"name": "default", "template": "A"}, {"name": "tool use", "template": "B"}, 3]
    settings["chat_template"] = listed
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("C")
    fields = gguf.GGUFReader(written(folder, tmp_path / "out.gguf")).fields
    found = {k: f.contents() for k, f in fields.items() if "chat_template" in k}
    assert sorted(found.pop("tokenizer.chat_templates")) == ["rag", "tool_use"]
    assert found == {
        "tokenizer.chat_template": "A",
        "tokenizer.chat_template.tool_use": "B",
        "tokenizer.chat_template.rag": "C",
    }


def test_our_reader_finds_the_same_tokens(make_model: Make, tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    folder = tmp_path / "model"
    shutil.copytree(make_model("llama"), folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *letters, "12", "lo", "llo"])}
    made = Tokenizer(BPE(vocab, [("1", "2"), ("l", "o"), ("l", "lo")]))
    made.add_special_tokens(["<s>", "</s>"])
    made.add_tokens([AddedToken("[user]", normalized=False)])
    steps = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    made.save(str(folder / "tokenizer.json"))
    file = written(folder, tmp_path / "alone" / "out.gguf")
    metadata, _, _ = read_header(file)
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    text = TEXT + "[user]hello12"
    ours = open_checkpoint(str(folder)).tokenizer()
    theirs = open_checkpoint(str(file)).tokenizer()
    assert ours.encode(text) == theirs.encode(text)
    again = written(file, tmp_path / "alone" / "again.gguf", type="f16")
    assert tokens.copied(again) == tokens.copied(file)  # from GGUF to GGUF nothing is made anew
    assert open_checkpoint(str(again)).tokenizer().encode(text) == ours.encode(text)


def pieces(folder: Path) -> None:
    """A tokenizer of pieces with byte_fallback, as Llama 2 and Gemma have."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a"]
    vocab = {word: i for i, word in enumerate(words)}
    made = Tokenizer(BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    made.add_special_tokens(["<s>", "</s>"])
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    made.normalizer = normalizers.Sequence(steps)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    made.save(str(folder / "tokenizer.json"))


def test_pieces_get_scores_and_types(make_model: Make, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(make_model("llama"), folder)
    pieces(folder)
    metadata, _, _ = read_header(written(folder, tmp_path / "out.gguf"))
    found = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items()}
    assert found["model"] == "llama" and found["add_space_prefix"] is True
    assert found["token_type"][:4] == [2, 3, 3, 6] and found["token_type"][-1] == 5
    scores = found["scores"]
    assert scores[260] > scores[261] and len(scores) == len(found["tokens"]) == 264


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_llama_cpp_finds_the_same_tokens(kind: str, make_model: Make, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    if kind == "bytes":
        folder = open_checkpoint("demo").folder
        pairs = tokens.made(PlainView(open_checkpoint("demo")), 49152, None)
        assert pairs["tokenizer.ggml.pre"][0] == "smollm"
    else:
        folder = tmp_path / "model"
        shutil.copytree(make_model("llama"), folder)
        pieces(folder)
        pairs = tokens.made(PlainView(open_checkpoint(str(folder))), 264, None)
    file = tmp_path / "vocabulary.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    for key, value in {"context_length": 64, "embedding_length": 64, "block_count": 1}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_uint32("llama.attention.head_count", 1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, (content, form, inner) in pairs.items():
        writer.add_key_value(key, content, form, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    model = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    ours = open_checkpoint("demo" if kind == "bytes" else str(folder)).tokenizer()
    for text in (TEXT, "a b ab", "12 3456", "don't I'LL"):
        assert model.tokenize(text.encode(), add_bos=False) == ours.encode(text), text


def test_what_is_refused_says_why(make_model: Make, tmp_path: Path, capfd) -> None:
    relu = tmp_path / "relu"
    shutil.copytree(make_model("llama"), relu)
    config = json.loads((relu / "config.json").read_text())
    (relu / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    word = tmp_path / "word"
    shutil.copytree(make_model("llama"), word)
    facts = json.loads((word / "tokenizer.json").read_text())
    facts["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "WhitespaceSplit"}, facts["pre_tokenizer"]],
    }
    (word / "tokenizer.json").write_text(json.dumps(facts))
    out, other = tmp_path / "out.gguf", tmp_path / "other.gguf"
    other.write_bytes(b"GGUF of somebody else")
    link = tmp_path / "link.gguf"
    link.symlink_to(other)
    cases = [
        ((make_model("opt"), "-o", out), "no GGUF form is known here for the family 'opt'"),
        ((relu, "-o", out), "its activation is relu"),
        ((word, "-o", out), "cuts text by a rule that is none of GGUF's"),
        ((make_model("llama"), "-o", tmp_path / "out"), "no name of a .gguf file"),
        ((make_model("llama"), "-o", other, "--force"), "optim has not made it"),
        ((make_model("llama"), "-o", link), "is a link or a folder"),
        ((make_model("llama"), "-o", out, "--pre", "gpt-5"), "there is no such rule"),
        ((OLD / "static", "-o", out), "static integer activations"),
        ((make_model("qwen3_moe"), "-o", out), "experts do not sum to 1"),
    ]
    for words, said in cases:
        assert run(*words) == 2, said
        err = capfd.readouterr().err
        assert said in err and "fix:" in err, err
    assert not out.exists() and other.read_bytes() == b"GGUF of somebody else"
    assert run(word, "-o", out, "--pre", "gpt-2") == 0
    assert run(word, "-o", out, "--pre", "gpt-2") == 2  # it exists now
    assert run(word, "-o", out, "--pre", "gpt-2", "--force", "--modelfile") == 0
    assert "FROM ./out.gguf" in (tmp_path / "out.Modelfile").read_text()
    (demo,) = open_checkpoint("demo").store.files
    assert run("demo", "-o", demo, "--force") == 2
    assert "is what is read" in capfd.readouterr().err


def test_the_file_itself_is_measured_before_it_has_its_name(
    make_model: Make, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    seen = []

    def prove(path: Path) -> None:
        seen.append((path.suffix, len(gguf.GGUFReader(path).tensors), out.exists()))

    wanted = Export(format="gguf", type="q8_0", pre="gpt-2")
    export(plan(str(make_model("llama")), wanted, str(out)), lambda *_: None, prove)
    count = len(open_checkpoint(str(make_model("llama"))).tensors)
    assert seen == [(".gguf", count, False)]
    assert list(tmp_path.iterdir()) == [out]


def test_a_stopped_run_leaves_nothing(tmp_path: Path) -> None:
    made = plan(str(OLD / "awq4"), Export(format="gguf"), str(tmp_path / "out.gguf"))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(made, stop)
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_changes_is_not_published(make_model: Make, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(make_model("llama"), source)
    made = plan(str(source), Export(format="gguf"), str(tmp_path / "out.gguf"))
    (weights,) = source.glob("*.safetensors")

    def change(*_: object) -> None:
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")

    with pytest.raises(OptimError, match="has changed while it was read"):
        export(made, change)
    assert not (tmp_path / "out.gguf").exists()
