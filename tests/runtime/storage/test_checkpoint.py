import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from optim.recipes.errors import OptimError
from optim.runtime.storage.checkpoint import require_plain
from optim.runtime.storage.open import open_checkpoint

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "head_dim": 8,
}


def refused(source: str | Path, code: int = 2, **options: Any) -> OptimError:
    with pytest.raises(OptimError) as caught:
        open_checkpoint(str(source), **options)
    assert caught.value.code == code
    return caught.value


def test_single_file_reads_back_equal(tiny_llama: LlamaForCausalLM, tiny_folder: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_folder))
    state = tiny_llama.state_dict()
    assert set(checkpoint.tensors) == set(state)
    for name, info in checkpoint.tensors.items():
        tensor = checkpoint.read(name)
        assert torch.equal(tensor, state[name])
        assert (info.shape, info.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert info.nbytes == tensor.numel() * tensor.element_size()
    assert checkpoint.name == "tiny"
    assert checkpoint.quantization is None
    assert checkpoint.hf_config().hidden_size == 64


def test_shards_read_back_equal(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    tiny_llama.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    checkpoint = open_checkpoint(str(tmp_path))
    for name, tensor in tiny_llama.state_dict().items():
        assert torch.equal(checkpoint.read(name), tensor)


def test_torch_bin_reads_back_equal(tiny_llama: LlamaForCausalLM, tiny_folder: Path) -> None:
    (tiny_folder / "model.safetensors").unlink()
    torch.save(tiny_llama.state_dict(), tiny_folder / "pytorch_model.bin")
    checkpoint = open_checkpoint(str(tiny_folder))
    for name, tensor in tiny_llama.state_dict().items():
        assert torch.equal(checkpoint.read(name), tensor)


def test_sharded_torch_bin(tiny_llama: LlamaForCausalLM, tiny_folder: Path) -> None:
    (tiny_folder / "model.safetensors").unlink()
    state = tiny_llama.state_dict()
    weight_map = {}
    for number, keys in enumerate((list(state)[::2], list(state)[1::2])):
        shard = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({key: state[key] for key in keys}, tiny_folder / shard)
        weight_map |= dict.fromkeys(keys, shard)
    index = tiny_folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(str(tiny_folder))
    for name, tensor in state.items():
        assert torch.equal(checkpoint.read(name), tensor)


class Touch:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_pickle_is_never_executed(tiny_folder: Path, tmp_path: Path) -> None:
    (tiny_folder / "model.safetensors").unlink()
    torch.save({"w": Touch(tmp_path / "owned")}, tiny_folder / "pytorch_model.bin")
    assert "not executed" in refused(tiny_folder).message
    assert not (tmp_path / "owned").exists()


def test_truncated_torch_bin(tiny_llama: LlamaForCausalLM, tiny_folder: Path) -> None:
    (tiny_folder / "model.safetensors").unlink()
    path = tiny_folder / "pytorch_model.bin"
    torch.save(tiny_llama.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-500])
    assert "damaged" in refused(tiny_folder).message


def test_mixtral_experts_are_single_linears(tmp_path: Path) -> None:
    model = MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=3))
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    fused = model.state_dict()["model.layers.1.mlp.experts.gate_up_proj"]
    base = "model.layers.1.mlp.experts.2"
    assert torch.equal(checkpoint.read(f"{base}.gate_proj.weight"), fused[2, :48])
    assert torch.equal(checkpoint.read(f"{base}.up_proj.weight"), fused[2, 48:])
    assert "model.layers.1.mlp.gate.weight" in checkpoint.tensors
    published = "model.layers.1.block_sparse_moe"
    assert checkpoint.disk_name(f"{base}.gate_proj.weight") == f"{published}.experts.2.w1.weight"
    assert checkpoint.disk_name(f"{base}.down_proj.weight") == f"{published}.experts.2.w2.weight"
    assert checkpoint.disk_name("model.layers.1.mlp.gate.weight") == f"{published}.gate.weight"
    on_disk = set(checkpoint.store.infos)
    assert {checkpoint.disk_name(name) for name in checkpoint.tensors} == on_disk


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_fused_experts_are_sliced_lazily(form: str, tmp_path: Path) -> None:
    facts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = Qwen3MoeConfig(**SMALL, **facts)
    model = Qwen3MoeForCausalLM(config)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    config.save_pretrained(tmp_path)
    if form == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        save_file(state, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(str(tmp_path))
    gate_up = state["model.layers.0.mlp.experts.gate_up_proj"]
    down = state["model.layers.0.mlp.experts.down_proj"]
    for e in range(3):
        base = f"model.layers.0.mlp.experts.{e}"
        assert torch.equal(checkpoint.read(f"{base}.gate_proj.weight"), gate_up[e, :16])
        assert torch.equal(checkpoint.read(f"{base}.up_proj.weight"), gate_up[e, 16:])
        assert torch.equal(checkpoint.read(f"{base}.down_proj.weight"), down[e])
        assert checkpoint.tensors[f"{base}.down_proj.weight"].shape == (32, 16)
    assert not any(name.endswith("gate_up_proj") for name in checkpoint.tensors)


def test_composed_model_gives_its_text_model(tmp_path: Path) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=SMALL, vision_config=vision, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    theirs = model.model.language_model.state_dict()
    assert {f"model.{name}" for name in theirs} <= set(checkpoint.tensors)
    for name, tensor in theirs.items():
        assert torch.equal(checkpoint.read(f"model.{name}"), tensor)
    assert any("vision" in name for name in checkpoint.left_out)
    assert not any("vision" in name for name in checkpoint.tensors)
    assert checkpoint.text_config["hidden_size"] == 32
    assert checkpoint.hf_config().model_type == "gemma3_text"


def test_fingerprint_follows_the_weights(tiny_folder: Path, tmp_path: Path) -> None:
    first = open_checkpoint(str(tiny_folder)).fingerprint()
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    assert open_checkpoint(str(copy)).fingerprint() == first
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    assert open_checkpoint(str(copy)).fingerprint() != first


def test_missing_tensor_names_itself(tiny_folder: Path) -> None:
    with pytest.raises(OptimError, match=r"model\.layers\.9\.x") as caught:
        open_checkpoint(str(tiny_folder)).read("model.layers.9.x")
    assert caught.value.code == 2


def test_quantized_model_opens_but_is_not_plain(tiny_folder: Path) -> None:
    path = tiny_folder / "config.json"
    config = json.loads(path.read_text()) | {
        "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32}
    }
    path.write_text(json.dumps(config))
    checkpoint = open_checkpoint(str(tiny_folder))
    with pytest.raises(OptimError, match=r"already quantized \(awq, 4 bits\)"):
        require_plain(checkpoint)


def test_plain_model_is_plain(tiny_folder: Path) -> None:
    require_plain(open_checkpoint(str(tiny_folder)))


def write_safetensors(path: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"w": entry([4], 0, 16), "v": entry([4], 8, 24)}, "overlap"),
        ({"w": entry([400], 0, 1600)}, "truncated"),
        ({"w": entry([4], 0, 12)}, "shape"),
        ({"w": entry([-4], 0, 16)}, "shape"),
        ({"w": entry([4], -16, 0)}, "shape"),
        ({"w": entry([2**62, 2**62], 0, 16)}, "shape"),
        ({"w": entry([4], 0, 16, dtype="Q9")}, "dtype"),
        ({"w": entry([4], 0, 16, dtype=[])}, "dtype"),  # type: ignore[arg-type]
        ({"w": {"shape": [4]}}, "malformed"),
        ({"w": 5}, "malformed"),
        ([1, 2], "JSON object"),
        (b'{"w": {"dtype"', "JSON"),
        (b"[" * 100_000, "JSON"),
        (b"\xff\xfe", "JSON"),
        (b'{"w": 1, "w": 2}', "twice"),
    ],
)
def test_lying_headers_are_refused(tiny_folder: Path, header: Any, says: str) -> None:
    write_safetensors(tiny_folder / "model.safetensors", header, bytes(24))
    assert says in refused(tiny_folder).message


@pytest.mark.parametrize("start", [b"", b"abc", struct.pack("<Q", 2**63), struct.pack("<Q", 9**9)])
def test_absurd_header_length(tiny_folder: Path, start: bytes) -> None:
    (tiny_folder / "model.safetensors").write_bytes(start)
    assert "damaged" in refused(tiny_folder).message


def test_truncated_shard_is_found_at_open(tiny_folder: Path) -> None:
    path = tiny_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    error = refused(tiny_folder)
    assert "truncated" in error.message
    assert error.fix


def test_shard_that_shrinks_after_open(tiny_folder: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_folder))
    path = tiny_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(OptimError, match="damaged"):
        for name in checkpoint.tensors:
            checkpoint.read(name)


@pytest.mark.parametrize(
    "weight_map",
    [
        {"w": "../secret.safetensors"},
        {"w": "/etc/passwd"},
        {"w": ".."},
        {"w": "..\\secret.safetensors"},
        {"w": "absent.safetensors"},
        {"absent": "one.safetensors"},
        {},
        [1],
        None,
    ],
)
def test_bad_index_is_refused(tiny_folder: Path, weight_map: Any) -> None:
    (tiny_folder / "model.safetensors").rename(tiny_folder / "one.safetensors")
    index = tiny_folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    refused(tiny_folder)


def test_a_file_is_read_before_an_index_that_was_left_beside_it(
    tiny_llama: LlamaForCausalLM, tiny_folder: Path, tmp_path: Path
) -> None:
    tiny_llama.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    for path in (tmp_path / "sharded").glob("model*"):
        shutil.copy(path, tiny_folder)
    weight = torch.full((64,), 7.0)
    state = tiny_llama.state_dict() | {"model.norm.weight": weight}
    save_file({k: v.contiguous() for k, v in state.items()}, tiny_folder / "model.safetensors")
    assert torch.equal(open_checkpoint(str(tiny_folder)).read("model.norm.weight"), weight)


def test_same_tensor_in_two_shards(tiny_folder: Path) -> None:
    shutil.copy(tiny_folder / "model.safetensors", tiny_folder / "other.safetensors")
    (tiny_folder / "model.safetensors").rename(tiny_folder / "one.safetensors")
    index = tiny_folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "other.safetensors"}}))
    assert "is also in" in refused(tiny_folder).message


def test_missing_shard_is_named(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    tiny_llama.save_pretrained(tmp_path, max_shard_size="50KB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    assert gone.name in refused(tmp_path).message
    (tmp_path / "model.safetensors.index.json").unlink()
    assert "shards" in refused(tmp_path).message


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "\udcff", '{"hidden_size": 4}', "[" * 50_000])
def test_bad_config(tiny_folder: Path, text: str) -> None:
    (tiny_folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(tiny_folder)


def test_folder_without_config_or_weights(tiny_folder: Path) -> None:
    (tiny_folder / "model.safetensors").unlink()
    assert "model.safetensors" in refused(tiny_folder).message
    (tiny_folder / "config.json").unlink()
    assert "config.json" in refused(tiny_folder).message
    (tiny_folder / "adapter_config.json").write_text("{}")
    assert "LoRA" in refused(tiny_folder).message


@pytest.mark.parametrize(
    "source", ["./nowhere", "nowhere", "/no/where/at/all", "absent.gguf", "a/b.gguf"]
)
def test_paths_that_do_not_exist(source: str) -> None:
    assert "there is no folder or file" in refused(source).message


def test_remote_code_needs_the_flag(tiny_folder: Path) -> None:
    path = tiny_folder / "config.json"
    own = {"model_type": "my_own_llm", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    ran = tiny_folder / "ran"
    code = f"""
import pathlib
from transformers import LlamaConfig
pathlib.Path({str(ran)!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "my_own_llm"
"""
    (tiny_folder / "configuration_own.py").write_text(code)
    assert "--trust-remote-code" in str(refused(tiny_folder).fix)
    assert not ran.exists()
    trusted = open_checkpoint(str(tiny_folder), trust_remote_code=True)
    assert type(trusted.hf_config()).__name__ == "OwnConfig"
    assert ran.exists()


def test_auto_map_of_a_known_type_is_ignored(tiny_folder: Path) -> None:
    path = tiny_folder / "config.json"
    config = json.loads(path.read_text()) | {"auto_map": {"AutoConfig": "evil.Config"}}
    path.write_text(json.dumps(config))
    (tiny_folder / "evil.py").write_text("raise SystemExit('ran')")
    assert open_checkpoint(str(tiny_folder)).hf_config().model_type == "llama"


def test_unknown_model_type(tiny_folder: Path) -> None:
    path = tiny_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "nonesuch"}))
    with pytest.raises(OptimError, match="nonesuch") as caught:
        open_checkpoint(str(tiny_folder)).hf_config()
    assert caught.value.code == 2


def test_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **options: Any) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    error = refused("someone/some-model", code=4)
    assert "someone/some-model" in error.message
    assert "HF_HUB_OFFLINE" in str(error.fix)
    assert "demo" in str(error.fix)


def test_hub_model_is_opened_from_its_snapshot(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    asked = []

    def snapshot(repo: str, **options: Any) -> str:
        asked.append((repo, options["revision"], options["allow_patterns"]))
        return str(tiny_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    checkpoint = open_checkpoint("someone/some-model", revision="v2")
    assert checkpoint.name == "some-model"
    assert [item[:2] for item in asked] == [("someone/some-model", "v2")]
    assert not any("bin" in pattern for pattern in asked[0][2])


def test_sidecars_are_copied(tiny_folder: Path, tmp_path: Path) -> None:
    (tiny_folder / "tokenizer.json").write_text("{}")
    (tiny_folder / "chat_template.jinja").write_text("hi")
    (tiny_folder / "run_me.py").write_text("")
    out = tmp_path / "out"
    out.mkdir()
    open_checkpoint(str(tiny_folder)).write_sidecars(out)
    names = {path.name for path in out.iterdir()}
    assert names == {"tokenizer.json", "chat_template.jinja", "generation_config.json"}
