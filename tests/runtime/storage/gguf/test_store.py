from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from optim.recipes.errors import OptimError
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.gguf.config import llama3_scaling
from optim.runtime.storage.gguf.store import BLOCK, OWN, TOP, deinterleave, hf_name
from optim.runtime.storage.open import open_checkpoint

Kind = gguf.GGMLQuantizationType
VOCAB = 128


def interleave(w: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to q and k: halves of each head become pairs."""
    return (
        w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
    )


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = ["<|end|>", *(chr(33 + k) for k in range(90)), "ab", *(f"<u{k}>" for k in range(36))]
    writer.add_token_list(tokens)
    writer.add_token_types([3, *[1] * 91, *[5] * 36])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def gguf_names(arch: str, experts: bool) -> dict[str, str]:
    """Hugging Face name -> GGUF name, the inverse of the table under test."""
    names = {f"{ours}.weight": f"{theirs}.weight" for theirs, ours in TOP.items()}
    kinds = {**BLOCK, **OWN.get(arch, {})}
    for layer in range(2):
        for theirs in kinds:
            name = f"blk.{layer}.{theirs}.weight"
            ours = hf_name(name, arch)
            assert ours is not None
            skip = "ffn_norm" if arch == "olmo2" else "ffn_gate_exps" if not experts else ""
            if theirs != skip:
                names[ours] = name
    return names


def write(
    path: Path,
    model: PreTrainedModel,
    arch: str,
    *,
    kind: Any = Kind.F32,
    change: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, w: w,
    extra: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> None:
    """Write a model as llama.cpp would; `change` is what its converter does to a tensor."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(20000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    extra(writer)
    add_tokenizer(writer)
    names = gguf_names(arch, hasattr(config, "num_experts"))
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        w = change(name, tensor.float())
        if name.endswith("gate_up_proj"):
            gate, up = w.chunk(2, dim=1)
            stem = names[name.replace("gate_up_proj", "gate_proj") + ".weight"]
            writer.add_tensor(stem, gate.contiguous().numpy())
            writer.add_tensor(stem.replace("gate", "up"), up.contiguous().numpy())
            continue
        stem = name.removesuffix(".weight").removesuffix(".bias")
        theirs = names[f"{stem}.weight"]
        if name.endswith(".bias"):
            theirs = theirs.replace(".weight", ".bias")
        if w.ndim > 1 and kind != Kind.F32:
            data = gguf.quants.quantize(w.numpy(), kind)
            writer.add_tensor(theirs, data, raw_dtype=kind)
        else:
            writer.add_tensor(theirs, np.ascontiguousarray(w.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_rows(model: PreTrainedModel) -> Callable[[str, torch.Tensor], torch.Tensor]:
    def change(name: str, w: torch.Tensor) -> torch.Tensor:
        if "q_proj" in name:
            return interleave(w, model.config.num_attention_heads)
        return interleave(w, model.config.num_key_value_heads) if "k_proj" in name else w

    return change


def equal(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Every tensor of the model is in the checkpoint, fused experts as single ones."""
    expected = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stem, _, kind = name.rpartition(".")
            for e, w in enumerate(tensor):
                parts = w.chunk(2) if kind == "gate_up_proj" else [w]
                kinds = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else ["down_proj"]
                expected |= {
                    f"{stem}.{e}.{k}.weight": part for k, part in zip(kinds, parts, strict=True)
                }
        else:
            expected[name] = tensor
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(checkpoint.read(name), tensor, rtol=0, atol=1e-6, msg=name)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: Any) -> None:
    if "demo" not in request.fixturenames:
        monkeypatch.setenv("OPTIM_CACHE", str(tmp_path / "cache"))


def test_llama_f32_reads_back_equal(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write(path, tiny_llama, "llama", change=llama_rows(tiny_llama))
    checkpoint = open_checkpoint(str(path))
    equal(checkpoint, tiny_llama)
    config = checkpoint.hf_config()
    assert checkpoint.config["dtype"] == "float32"
    assert checkpoint.name == "tiny"
    assert config.hidden_size == 64
    assert config.num_key_value_heads == 2
    assert config.rms_norm_eps == 1e-5
    assert config.rope_parameters["rope_theta"] == 20000.0
    assert config.vocab_size == VOCAB
    assert not config.tie_word_embeddings
    assert checkpoint.config["rms_norm_eps"] == 1e-5


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q5_1, Kind.BF16, Kind.F16])
def test_quantized_llama(kind: Any, tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    change = llama_rows(tiny_llama)
    write(path, tiny_llama, "llama", kind=kind, change=change)
    checkpoint = open_checkpoint(str(path))
    dtype = torch.float16 if kind == Kind.F16 else torch.bfloat16
    assert checkpoint.config["dtype"] == str(dtype).removeprefix("torch.")
    for name, tensor in tiny_llama.state_dict().items():
        stored = tensor
        if tensor.ndim > 1:
            rows = gguf.quants.quantize(change(name, tensor).numpy(), kind)
            stored = torch.from_numpy(gguf.quants.dequantize(rows, kind).copy())
            heads = 4 if "q_proj" in name else 2
            stored = deinterleave(stored, heads) if "q_proj" in name or "k_proj" in name else stored
        read = checkpoint.read(name)
        assert read.dtype == dtype
        assert torch.equal(read, stored.to(dtype)), name


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_deinterleave_is_the_inverse(heads: int) -> None:
    w = torch.randn(heads * 8, 5)
    assert torch.equal(deinterleave(interleave(w, heads), heads), w)


SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
}


def test_gemma_norms_lose_their_one(tmp_path: Path) -> None:
    model = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=16))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter)
    path = tmp_path / "g.gguf"

    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_key_length(16)
        writer.add_attn_logit_softcapping(44.0)
        writer.add_final_logit_softcapping(22.0)
        writer.add_sliding_window(64)

    change = lambda name, w: w + 1 if name.endswith("norm.weight") else w  # noqa: E731
    write(path, model, "gemma2", change=change, extra=extra)
    checkpoint = open_checkpoint(str(path))
    equal(checkpoint, model)
    config = checkpoint.hf_config()
    assert config.attn_logit_softcapping == 44.0
    assert config.final_logit_softcapping == 22.0
    assert config.sliding_window == 64
    assert config.query_pre_attn_scalar == 16
    assert config.tie_word_embeddings


def test_mixtral_stacks_are_single_experts(tmp_path: Path) -> None:
    model = MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=3))
    path = tmp_path / "m.gguf"

    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_expert_count(3)
        writer.add_expert_used_count(2)

    write(path, model, "llama", change=llama_rows(model), extra=extra)
    checkpoint = open_checkpoint(str(path))
    equal(checkpoint, model)
    assert checkpoint.hf_config().num_local_experts == 3


def test_qwen3_moe(tmp_path: Path) -> None:
    own = {"num_experts": 3, "moe_intermediate_size": 32, "head_dim": 16}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **own, num_experts_per_tok=2))
    path = tmp_path / "q.gguf"

    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_expert_count(3)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(32)
        writer.add_key_length(16)

    write(path, model, "qwen3moe", kind=Kind.Q8_0, extra=extra)
    checkpoint = open_checkpoint(str(path))
    config = checkpoint.hf_config()
    assert (config.num_experts, config.moe_intermediate_size, config.head_dim) == (3, 32, 16)
    assert config.norm_topk_prob
    expected = model.state_dict()["model.layers.1.mlp.experts.gate_up_proj"][2, 32:]
    read = checkpoint.read("model.layers.1.mlp.experts.2.up_proj.weight")
    assert read.shape == (32, 64)
    torch.testing.assert_close(read.float(), expected, rtol=0, atol=2e-3)


FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "phi3": (Phi3Config, Phi3ForCausalLM, {}),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM, {}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {"head_dim": 16, "sliding_window": 32}),
    "granite": (
        GraniteConfig,
        GraniteForCausalLM,
        {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "attention_bias": True},
    ),
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_other_families(family: str, tmp_path: Path) -> None:
    config_class, model_class, own = FAMILIES[family]
    model = model_class(config_class(**SMALL, **own))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter)
    path = tmp_path / f"{family}.gguf"

    def extra(writer: gguf.GGUFWriter) -> None:
        if family == "granite":
            writer.add_embedding_scale(3.0)
            writer.add_logit_scale(2.0)
        elif family == "gemma3":
            writer.add_key_length(16)
            writer.add_sliding_window(32)

    def change(name: str, w: torch.Tensor) -> torch.Tensor:
        if family == "gemma3":
            return w + 1 if name.endswith("norm.weight") else w
        return llama_rows(model)(name, w) if family in ("granite", "smollm3") else w

    write(path, model, family, change=change, extra=extra)
    checkpoint = open_checkpoint(str(path))
    equal(checkpoint, model)
    for key, value in own.items():
        assert getattr(checkpoint.hf_config(), key) == value


def test_llama3_scaling_is_found_again() -> None:
    half, theta, factor = 64, 500000.0, 8.0
    factors = []
    for k in range(half):  # as in llama.cpp's converter
        wave = 2 * np.pi * theta ** (2 * k / (2 * half))
        if wave < 8192 / 4:
            factors.append(1.0)
        elif wave > 8192 / 1:
            factors.append(factor)
        else:
            smooth = (8192 / wave - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    scaling = llama3_scaling(torch.tensor(factors), theta)
    assert scaling is not None
    assert scaling["factor"] == 8.0
    assert scaling["original_max_position_embeddings"] == 8192
    assert llama3_scaling(torch.tensor(factors) * 1.5, theta) is None


def test_unknown_architecture(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "rwkv6")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(OptimError, match="rwkv6") as caught:
        open_checkpoint(str(path))
    assert caught.value.code == 2


def test_unknown_tensor_is_not_dropped_in_silence(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    path = tmp_path / "x.gguf"

    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.0.attn_sinks.weight", np.zeros(4, dtype=np.float32))

    write(path, tiny_llama, "llama", extra=extra)
    with pytest.raises(OptimError, match="attn_sinks"):
        open_checkpoint(str(path))


def test_part_of_a_split_file(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    path = tmp_path / "x-00001-of-00002.gguf"
    write(path, tiny_llama, "llama", extra=lambda writer: writer.add_uint16("split.count", 2))
    with pytest.raises(OptimError, match="split") as caught:
        open_checkpoint(str(path))
    assert "--merge" in str(caught.value.fix)


def test_llama3_rope_comes_back_into_the_configuration(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    path = tmp_path / "x.gguf"
    theta, half = 20000.0, 8
    wave = 2 * np.pi * theta ** (np.arange(half) / half)
    smooth = np.clip((8192 / wave - 1) / 3, 0, 1)
    factors = (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)
    write(path, tiny_llama, "llama", extra=lambda w: w.add_tensor("rope_freqs.weight", factors))
    checkpoint = open_checkpoint(str(path))
    rope = checkpoint.hf_config().rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("llama3", 8.0, theta)
    assert "rope_freqs.weight" not in checkpoint.tensors


def test_every_truncation_is_refused(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write(path, tiny_llama, "llama")
    whole = path.read_bytes()
    for keep in (0, 3, 4, 20, 24, 100, 1000, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:keep])
        with pytest.raises(OptimError, match="damaged") as caught:
            open_checkpoint(str(path))
        assert caught.value.code == 2


def test_demo_is_what_the_gguf_package_reads(demo: Checkpoint) -> None:
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(demo.store.files[0]).tensors}
    assert len(demo.tensors) == len(stored)
    for theirs, ours in {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "blk.0.attn_q": "model.layers.0.self_attn.q_proj",
        "blk.17.attn_k": "model.layers.17.self_attn.k_proj",
        "blk.29.attn_v": "model.layers.29.self_attn.v_proj",
        "blk.5.ffn_down": "model.layers.5.mlp.down_proj",
        "blk.29.ffn_norm": "model.layers.29.post_attention_layernorm",
    }.items():
        tensor = stored[f"{theirs}.weight"]
        w = demo.read(f"{ours}.weight")
        heads = {"q_proj": 9, "k_proj": 3}.get(ours.rpartition(".")[2])
        w = interleave(w, heads) if heads else w
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(w, values.to(torch.bfloat16)), ours


def test_demo_configuration(demo: Checkpoint) -> None:
    config = demo.hf_config()
    assert (config.hidden_size, config.num_hidden_layers, config.head_dim) == (576, 30, 64)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert config.rope_parameters["rope_theta"] == 100000.0
    assert config.rms_norm_eps == 1e-5
    assert config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    assert demo.name == "SmolLM2-135M-Instruct"
