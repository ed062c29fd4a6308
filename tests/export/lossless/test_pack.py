"""Packing whole models: every tensor of every family, resume, refusals, damaged files."""

import json
import os
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from optim.export.lossless import pack as pack_module
from optim.export.lossless.pack import pack
from optim.export.lossless.plan import plan
from optim.export.lossless.unpack import unpack
from optim.recipes.errors import OptimError
from optim.recipes.schema import Pack
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.lossless.dfloat11 import patterns
from optim.runtime.storage.lossless.layouts import LAYOUTS
from optim.runtime.storage.lossless.store import LosslessStore
from optim.runtime.storage.manifest import verify
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.storage.tensors import Part
from optim.runtime.system.hashes import tensors_sha256

Make = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("one_thread")


def quiet(at: int, total: int, text: str) -> None:
    pass


def packed(source: Path, output: Path, layout: str = "df11", **keys: object) -> Checkpoint:
    pack(plan(str(source), Pack(layout=layout, **keys), str(output)), quiet)
    return open_checkpoint(str(output))


def same_tensors(a: Checkpoint, b: Checkpoint) -> None:
    assert a.store.infos.keys() == b.store.infos.keys()
    for name, info in a.store.infos.items():
        one, two = a.store.read(Part(name)), b.store.read(Part(name))
        assert (one.shape, one.dtype) == (two.shape, two.dtype) == (info.shape, info.dtype), name
        assert torch.equal(one.view(torch.uint8), two.view(torch.uint8)), name


@pytest.mark.parametrize("layout", ["df11", "bf12"])
def test_every_family_comes_back(make_model: Make, family: str, layout: str, tmp_path) -> None:
    folder = make_model(family)
    made = packed(folder, tmp_path / "out", layout)
    assert made.layout == layout and made.quantization is None
    same_tensors(open_checkpoint(str(folder)), made)
    assert {k: v for k, v in made.config.items()} == json.loads(
        (folder / "config.json").read_text()
    )
    assert verify(tmp_path / "out") == []


def test_unpack_gives_the_tensors_back(make_model: Make, tmp_path: Path) -> None:
    folder = make_model("llama")
    packed(folder, tmp_path / "out")
    made = unpack(str(tmp_path / "out"), str(tmp_path / "back"), quiet)
    assert made.proven == made.tensors > 20
    before = load_file(folder / "model.safetensors")
    (shard,) = (tmp_path / "back").glob("*.safetensors")
    after = load_file(shard)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k].view(torch.int16), after[k].view(torch.int16)) for k in after)
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )


def test_the_folder_is_what_the_published_releases_are(make_model: Make, tmp_path: Path) -> None:
    packed(make_model("llama"), tmp_path / "out")
    facts = json.loads((tmp_path / "out/config.json").read_text())["dfloat11_config"]
    assert facts["version"] == "0.5.0"
    assert (facts["threads_per_block"], facts["bytes_per_thread"]) == ([512], 8)
    seven = [*(f"self_attn.{c}_proj" for c in "qkvo")]
    seven += [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    wanted = {r"model\.layers\.\d+": seven, r"model\.embed_tokens": [], "lm_head": []}
    assert facts["pattern_dict"] == wanted
    stored = load_file(tmp_path / "out/model_layers_0.safetensors")
    pieces = ("luts", "encoded_exponent", "sign_mantissa", "gaps", "output_positions")
    block = {f"model.layers.0.{p}" for p in (*pieces, "split_positions")}
    norms = {f"model.layers.0.{n}_layernorm.weight" for n in ("input", "post_attention")}
    assert stored.keys() == block | norms
    assert stored["model.layers.0.split_positions"].dtype == torch.int64


def test_without_our_manifest_it_is_a_published_folder(make_model: Make, tmp_path: Path) -> None:
    folder = make_model("qwen3")
    packed(folder, tmp_path / "out")
    (tmp_path / "out/optim.json").unlink()
    same_tensors(open_checkpoint(str(folder)), open_checkpoint(str(tmp_path / "out")))


def test_blocks_that_differ_have_patterns_of_their_own() -> None:
    units = {
        "h.0": ["h.0.a.weight", "h.0.b.weight"],
        "h.1": ["h.1.a.weight"],
        "head": ["head.weight"],
    }
    made = patterns(units)
    assert made == {r"h\.0": ["a", "b"], r"h\.1": ["a"], "head": []}
    assert patterns({"h.10": ["h.10.a.weight"], "h.9": ["h.9.a.weight"]}) == {r"h\.\d+": ["a"]}


def test_a_killed_run_goes_on_with_the_same_bytes(make_model: Make, tmp_path, monkeypatch) -> None:
    folder = make_model("llama")
    packed(folder, tmp_path / "whole")
    prove, seen = pack_module._Job._prove, []

    def killed(job, record) -> None:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(record["file"])
        prove(job, record)

    monkeypatch.setattr(pack_module._Job, "_prove", killed)
    with pytest.raises(KeyboardInterrupt):
        packed(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").is_dir()
    monkeypatch.setattr(pack_module._Job, "_prove", prove)
    with pytest.raises(OptimError, match="unfinished run of something else"):
        packed(folder, tmp_path / "out", "bf12")
    packed(folder, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
    for path in (tmp_path / "whole").iterdir():
        if path.name != "README.md":  # has the folder's name
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_a_killed_unpacking_goes_on(make_model: Make, tmp_path: Path, monkeypatch) -> None:
    packed(make_model("llama"), tmp_path / "packed")
    monkeypatch.setattr("optim.runtime.storage.workspace.SHARD_BYTES", 20_000)
    unpack(str(tmp_path / "packed"), str(tmp_path / "whole"), quiet)

    def killed(at: int, total: int, text: str) -> None:
        assert total > 3
        if at == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unpack(str(tmp_path / "packed"), str(tmp_path / "out"), killed)
    assert not (tmp_path / "out").exists()
    steps: list[int] = []
    unpack(str(tmp_path / "packed"), str(tmp_path / "out"), lambda at, *_: steps.append(at))
    assert steps[0] == 3 and not (tmp_path / "out.partial").exists()
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_a_pruned_model_is_not_packed(make_model: Make, tmp_path: Path) -> None:
    """The copy would lack the side file, and run densely."""
    folder = shutil.copytree(make_model("llama"), tmp_path / "pruned")
    save_file({"x": torch.zeros(1)}, folder / "sparsity.safetensors")
    with pytest.raises(OptimError, match="is pruned"):
        packed(folder, tmp_path / "out")


def test_a_shard_that_does_not_prove_is_not_kept(make_model: Make, tmp_path, monkeypatch) -> None:
    calls = count()
    never_twice = lambda tensors: f"{next(calls)} {tensors_sha256(tensors)}"  # noqa: E731
    monkeypatch.setattr("optim.export.lossless.pack.tensors_sha256", never_twice)
    with pytest.raises(OptimError, match="does not decode to what it was") as caught:
        packed(make_model("llama"), tmp_path / "out")
    assert caught.value.code == 3
    assert not (tmp_path / "out").exists()


@pytest.fixture
def odd_model(make_model: Make, tmp_path: Path) -> Path:
    """A llama with an infinite weight, and one of every 16-bit pattern."""
    folder = tmp_path / "odd"
    shutil.copytree(make_model("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = float("inf")
    everything = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    tensors["extra.weight"] = everything.view(256, 256)
    tensors["nothing.weight"] = torch.empty(0, 7, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("layout", ["df11", "bf12"])
def test_what_a_layout_cannot_hold_stays_bf16(odd_model: Path, tmp_path, layout: str) -> None:
    made = packed(odd_model, tmp_path / "out", layout)
    same_tensors(open_checkpoint(str(odd_model)), made)
    assert isinstance(made.store, LosslessStore)
    assert made.store.held("extra.weight") is None
    assert (made.store.held("model.layers.0.mlp.up_proj.weight") is None) == (layout == "df11")
    notes = json.loads((tmp_path / "out/optim.json").read_text())["notes"]
    assert any("extra.weight stays bf16" in note for note in notes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_wider_models_are_cast_only_when_asked(make_model: Make, tmp_path: Path, dtype) -> None:
    folder = make_model("llama", dtype)
    with pytest.raises(OptimError, match="100% of the weights are float") as caught:
        packed(folder, tmp_path / "out")
    assert caught.value.code == 2 and "--cast" in (caught.value.fix or "")
    made = packed(folder, tmp_path / "out", cast=True)
    source = open_checkpoint(str(folder))
    for name in source.tensors:
        assert torch.equal(made.read(name), source.read(name).to(torch.bfloat16))
    assert made.config["dtype"] == "bfloat16"


def test_only_what_is_asked_for_is_packed(make_model: Make, tmp_path: Path) -> None:
    made = packed(make_model("llama"), tmp_path / "out", targets=("lm_head", "re:.*down_proj"))
    held = {n for n in made.tensors if made.held(n)}
    assert held == {"lm_head.weight", *(f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1))}
    same_tensors(open_checkpoint(str(make_model("llama"))), made)


def test_packing_a_packed_folder_anew(make_model: Make, tmp_path: Path) -> None:
    packed(make_model("llama"), tmp_path / "one")
    made = packed(tmp_path / "one", tmp_path / "two", "bf12")
    same_tensors(open_checkpoint(str(make_model("llama"))), made)
    with pytest.raises(OptimError, match="is not packed"):
        unpack(str(make_model("llama")), str(tmp_path / "never"), quiet)


@pytest.fixture(scope="module")
def good(make_model: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "out"
    packed(make_model("llama"), folder)
    return folder


def read_all(folder: Path) -> None:
    store = open_checkpoint(str(folder)).store
    for name in store.infos:
        store.read(Part(name))


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_never_gives_a_wrong_weight(good, make_model, tmp_path, seed: int) -> None:
    """It is refused with a name, or changes nothing (in what nothing reads, like most gaps)."""
    folder = tmp_path / "bad"
    shutil.copytree(good, folder)
    shard = folder / "model_layers_1.safetensors"
    data = bytearray(shard.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    at = begin + seed * 7919 * 13 % (len(data) - begin)
    data[at] ^= 1 << seed % 8
    shard.write_bytes(data)
    try:
        read_all(folder)
    except OptimError as error:
        assert error.code == 2 and "model.layers.1" in error.message
    else:
        same_tensors(open_checkpoint(str(make_model("llama"))), open_checkpoint(str(folder)))
    assert verify(folder) == ["model_layers_1.safetensors has changed since it was written"]


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_a_truncated_shard_is_refused_with_a_name(good: Path, tmp_path: Path, cut: int) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(good, folder)
    shard = folder / "model_layers_0.safetensors"
    os.truncate(shard, shard.stat().st_size - cut)
    with pytest.raises(OptimError, match=r"model_layers_0.*truncated"):
        read_all(folder)


HOSTILE = {
    r"(a+)+b": "repeats too much",
    r"(": "not a valid regular expression",
    "x" * 5000: "at most",
    r"never": "no pattern of dfloat11_config names it",
}


@pytest.mark.parametrize("pattern", HOSTILE)
def test_a_hostile_pattern_is_refused(good: Path, tmp_path: Path, pattern: str) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(good, folder)
    config = json.loads((folder / "config.json").read_text())
    config["dfloat11_config"]["pattern_dict"] = {pattern: []}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(OptimError, match=HOSTILE[pattern]):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("value", [None, [], {"x": 1}, {"x": [1]}, {"x": ["a"] * 3}])
def test_a_wrong_pattern_dict_is_refused(good: Path, tmp_path: Path, value) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(good, folder)
    config = json.loads((folder / "config.json").read_text())
    config["dfloat11_config"]["pattern_dict"] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(OptimError):
        open_checkpoint(str(folder))


def test_old_and_unknown_versions_are_refused(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(good, folder)
    config = json.loads((folder / "config.json").read_text())
    config["dfloat11_config"]["version"] = "0.1.0"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(OptimError, match=r"version .0\.1\.0. is not known"):
        open_checkpoint(str(folder))


def test_the_layouts_are_those_of_the_recipe() -> None:
    assert set(LAYOUTS) == set(get_args(Pack.model_fields["layout"].annotation))
