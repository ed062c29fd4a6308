"""What is made untrue: small models of every kind, whole and sound."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import exchange
import gguf
import numpy as np
import torch
from lies import write_json
from safetensors.torch import save_file

TESTS = Path(__file__).parents[1]
ARTIFACTS = TESTS / "data" / "artifacts"
sys.path.insert(0, str(TESTS))

import conftest  # noqa: E402

PLAIN: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 264,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
NORMS = ("input_layernorm", "post_attention_layernorm")
LINEARS = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}
TO_GGUF = {
    **{"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"},
    **{"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"},
    **{"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm"},
    "post_attention_layernorm": "ffn_norm",
}


def tensors() -> dict[str, torch.Tensor]:
    """The weights of PLAIN."""
    draw = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=draw) * 0.15).to(torch.bfloat16)

    norm = torch.ones(64, dtype=torch.bfloat16)
    made = {"model.embed_tokens.weight": weight(264, 64), "lm_head.weight": weight(264, 64)}
    made["model.norm.weight"] = norm
    for i in range(2):
        made |= {f"model.layers.{i}.{name}.weight": norm.clone() for name in NORMS}
        made |= {f"model.layers.{i}.{n}.weight": weight(*shape) for n, shape in LINEARS.items()}
    return made


def save_tokenizer(folder: Path) -> None:
    """One token a byte, and one merge: GGUF has no vocabulary without any."""
    conftest._save_tokenizer(folder)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"]["Hi"] = len(data["model"]["vocab"])
    data["model"]["merges"] = [["H", "i"]]
    path.write_text(json.dumps(data))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    write_json(folder / "tokenizer_config.json", settings | {"chat_template": template})


def make_plain(folder: Path) -> None:
    """A dense model in two shards with an index."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", PLAIN)
    whole, index = tensors(), {}
    for k, names in enumerate((sorted(whole)[:8], sorted(whole)[8:]), 1):
        shard = f"model-{k:05d}-of-00002.safetensors"
        save_file({name: whole[name] for name in names}, folder / shard, {"format": "pt"})
        index |= dict.fromkeys(names, shard)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    save_tokenizer(folder)


def make_gguf(path: Path) -> None:
    """The same model as a GGUF file, with a vocabulary of 264 words."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(264)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    letters = [chr(0x100 + i) for i in range(263)]
    writer.add_token_list([*letters, letters[0] + letters[1]])
    writer.add_token_types([1] * 264)
    writer.add_token_merges([" ".join(letters[:2])])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    ends = {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}
    for name, tensor in tensors().items():
        module = name.removesuffix(".weight")
        if module in ends:
            new = ends[module]
        else:
            _, _, block, inside = module.split(".", 3)
            new = f"blk.{block}.{TO_GGUF[inside]}"
        writer.add_tensor(f"{new}.weight", tensor.float().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_all(root: Path) -> None:
    """Every base under its name in `root`."""
    make_plain(root / "plain")
    bare = {k: v for k, v in tensors().items()}
    (root / "torch").mkdir()
    write_json(root / "torch" / "config.json", PLAIN)
    torch.save(bare, root / "torch" / "pytorch_model.bin")
    (root / "gguf").mkdir()
    make_gguf(root / "gguf" / "model.gguf")
    for folder in ARTIFACTS.iterdir():
        if folder.is_dir():
            shutil.copytree(folder, root / folder.name)
            save_tokenizer(root / folder.name)
    for name in exchange.FOREIGN:
        base, form = name.split("-as-")
        (root / name).mkdir()
        made = exchange.write(root / base, root / name, form)
        if made.is_dir():
            shutil.copytree(made, root / name, dirs_exist_ok=True)
            shutil.rmtree(made)
