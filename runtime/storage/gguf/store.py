"""A `.gguf` file as a checkpoint: llama.cpp's names and layouts turned back into Hugging Face's.

What llama.cpp's converter changed is undone: q and k rows of the llama family are interleaved for
its rotary embedding, Gemma's norms are stored as 1 + w, experts are stacked. Tensors read as
bfloat16 (float32 or float16 if the whole file is).
"""

import math
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.kernels.door import Array
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.gguf.config import ROPE_TABLES, gguf_config
from optim.runtime.storage.gguf.file import GgufTensor, read_bytes, read_header, read_rows
from optim.runtime.storage.gguf.tokenizer import sidecar_folder
from optim.runtime.storage.tensors import Part, TensorInfo
from optim.runtime.system.files import damaged

INTERLEAVED = {"llama", "granite", "smollm3"}  # q and k rows permuted by the converter
TURNED = ("self_attn.q_proj", "self_attn.k_proj")
NORM_PLUS_ONE = {"gemma2", "gemma3"}

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
# Where an architecture differs from BLOCK.
AFTER = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GEMMA = AFTER | {"ffn_norm": "pre_feedforward_layernorm"}
OWN = {
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "olmo2": AFTER,
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
}

Header = tuple[dict[str, Any], dict[str, GgufTensor], int]


def hf_name(name: str, arch: str) -> str | None:
    """Hugging Face name of a GGUF tensor; None for an unknown one."""
    stem, _, suffix = name.rpartition(".")
    if not stem.startswith("blk."):
        return f"{TOP[stem]}.{suffix}" if stem in TOP else None
    _, layer, kind = [*stem.split(".", 2), ""][:3]
    own = OWN.get(arch, {}).get(kind, BLOCK.get(kind))
    return f"model.layers.{layer}.{own}.{suffix}" if own else None


def deinterleave(w: Tensor, heads: int) -> Tensor:
    """Rows [heads * dim, ...] from llama.cpp's rotary order (pairs) to Hugging Face's (halves)."""
    dim = w.shape[0] // heads
    return w.view(heads, dim // 2, 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


def stored_dtype(table: dict[str, GgufTensor]) -> torch.dtype:
    """float32 or float16 if every matrix of the file is; bfloat16 for anything quantized."""
    kinds = {tensor.kind for tensor in table.values() if len(tensor.shape) > 1}
    if kinds <= {Kind.F32}:
        return torch.float32
    return torch.float16 if kinds <= {Kind.F16, Kind.F32} else torch.bfloat16


class GgufStore:
    """The tensors of a GGUF file under Hugging Face names, de-quantized when read."""

    def __init__(self, path: Path, arch: str, heads: tuple[int, int], head: Header) -> None:
        self.files, self._path, self._arch, self._heads = [path], path, arch, heads
        _, table, self._data = head
        self.dtype = stored_dtype(table)
        self.infos: dict[str, TensorInfo] = {}
        self._table: dict[str, GgufTensor] = {}
        for name, tensor in table.items():
            if name in ROPE_TABLES:
                continue  # frequencies: part of the configuration
            if (ours := hf_name(name, arch)) is None:
                fix = "use the Hugging Face folder of the model"
                raise OptimError(f"{path}: {name} is unknown in {arch}", fix, USAGE)
            if ours in self.infos:
                damaged(path, f"{name} is a second {ours}")
            nbytes = math.prod(tensor.shape) * self.dtype.itemsize
            self.infos[ours] = TensorInfo(tensor.shape, self.dtype, nbytes)
            self._table[ours] = tensor

    def held(self, name: str) -> tuple[str, float]:
        """The type of a tensor in the file, and its bytes there."""
        tensor = self._table[name]
        return tensor.kind.name, tensor.nbytes

    def kind(self, name: str) -> Kind:
        """The type of a tensor in the file."""
        return self._table[name].kind

    def raw(self, name: str) -> Array:
        """A tensor's bytes in the file, uint8 `[rows, bytes of a row]`."""
        return read_bytes(self._path, self._data, self._table[name])

    def read(self, part: Part) -> Tensor:
        """The tensor or part, de-quantized, in Hugging Face's layout."""
        turned = self.turned(part.stored)
        if turned and part.rows is not None:  # its rows are elsewhere in the file
            return self.read(Part(part.stored))[slice(*part.rows)].clone()
        tensor = self._table[part.stored]
        first, count = part.span(tensor.shape)
        width = tensor.shape[-1]
        plus_one = self._arch in NORM_PLUS_ONE and part.stored.endswith("norm.weight")
        dtype = torch.float32 if plus_one else self.dtype
        w = read_rows(self._path, self._data, tensor, first // width, count // width, dtype)
        w = w.view(part.shape(tensor.shape))
        if turned:
            w = deinterleave(w, turned)
        return (w - 1).to(self.dtype) if plus_one else w

    def turned(self, name: str) -> int:
        """Heads of a tensor whose rows are in llama.cpp's order, else 0."""
        if self._arch in INTERLEAVED:
            for part, heads in zip(TURNED, self._heads, strict=True):
                if part in name:
                    return heads
        return 0


def open_gguf(path: Path, source: str, name: str) -> Checkpoint:
    """The GGUF file at `path` as a checkpoint.

    Raises OptimError (2) for a damaged file, an architecture or a tensor type not known here.
    """
    head = read_header(path)
    metadata, table, data = head
    config = gguf_config(path, metadata, table, data)
    heads = (config["num_attention_heads"], config["num_key_value_heads"])
    store = GgufStore(path, metadata["general.architecture"], heads, head)
    config["dtype"] = str(store.dtype).removeprefix("torch.")
    return Checkpoint(source, name, config, sidecar_folder(path, metadata, data), store)
