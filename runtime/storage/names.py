"""Stored tensor names <-> canonical names.

A canonical name is the module path in transformers' modeling code of the *text* model, and an
expert is always one linear each: `model.layers.3.mlp.experts.7.gate_proj.weight`. On disk:

- gpt-neox publishes its head, canonically always `lm_head`, as `embed_out`;
- mixtral and phimoe publish `block_sparse_moe.experts.7.w1.weight` (w1 gate, w3 up, w2 down);
- transformers 5 holds experts as stacks: `experts.gate_up_proj` [E, 2I, H], `down_proj` [E, H, I];
- composed models (text + vision) put the text model under a prefix; the rest of them is left out.
"""

import re
from typing import Any

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.architecture.config import text_part
from optim.runtime.storage.tensors import Part, TensorInfo

W_NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
NEOX = "gpt_neox"
W_STYLE = {"mixtral", "phimoe", "minimax"}  # model types published with w1/w2/w3
TEXT_PREFIXES = (
    "language_model.model.",
    "model.language_model.",
    "language_model.",
    "model.text_model.",
)
STACK = re.compile(r"(.*\.experts)\.(gate_up_proj|gate_proj|up_proj|down_proj)(\.weight)?")
W_EXPERT = re.compile(r"(.*)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.(.*)")
BUFFER = re.compile(
    r".*(rotary_emb\.inv_freq|attention\.bias|attention\.masked_bias|attn\.masked_bias)"
)


def is_stack(name: str, info: TensorInfo, hidden: Any) -> bool:
    """Whether this is a fused expert tensor in the plain [E, out, in] layout."""
    match = STACK.fullmatch(name)
    if match is None or len(info.shape) != 3 or not info.nbytes:
        return False
    return bool(info.shape[1 if match[2] == "down_proj" else 2] == hidden)


def split_stack(name: str, info: TensorInfo) -> dict[str, Part]:
    """Single experts of a fused tensor `name`, as parts of it."""
    match = STACK.fullmatch(name)
    assert match is not None
    experts, out = info.shape[0], info.shape[1]
    if match[2] != "gate_up_proj":
        return {f"{match[1]}.{e}.{match[2]}.weight": Part(name, e) for e in range(experts)}
    parts = {}
    for e in range(experts):
        parts[f"{match[1]}.{e}.gate_proj.weight"] = Part(name, e, (0, out // 2))
        parts[f"{match[1]}.{e}.up_proj.weight"] = Part(name, e, (out // 2, out))
    return parts


def plain_name(name: str, model_type: str, composed: bool) -> str | None:
    """Canonical name of an unfused stored tensor; None if it is no part of the text model."""
    if composed:
        name = name.removeprefix("language_model.") if "language_model.lm_head" in name else name
        prefix = next((p for p in TEXT_PREFIXES if name.startswith(p)), None)
        if prefix is None and not name.startswith(("lm_head.", "model.layers.")):
            return None
        name = f"model.{name.removeprefix(prefix)}" if prefix else name
    if BUFFER.fullmatch(name):
        return None
    if model_type == NEOX:
        name = re.sub(r"^embed_out\.", "lm_head.", name)
    if model_type in W_STYLE:
        if match := W_EXPERT.fullmatch(name):
            return f"{match[1]}.mlp.experts.{match[2]}.{W_NAMES[match[3]]}.{match[4]}"
        return name.replace(".block_sparse_moe.", ".mlp.")
    return name


def canonical_parts(
    infos: dict[str, TensorInfo], config: dict[str, Any], model_type: str
) -> tuple[dict[str, Part], tuple[str, ...]]:
    """Canonical name -> stored part, and the stored names that are left out (vision, buffers)."""
    text = text_part(config)
    hidden = text.get("hidden_size")
    prefixes = ("language_model.", "model.text_model.")
    composed = text is not config and any(p in name for name in infos for p in prefixes)
    parts: dict[str, Part] = {}
    left_out = []
    for stored, info in infos.items():
        name = plain_name(stored, model_type, composed)
        if name is None:
            left_out.append(stored)
            continue
        found = {name: Part(stored)}
        if is_stack(name, info, hidden):
            split = split_stack(name, info)
            found = {key: Part(stored, p.expert, p.rows) for key, p in split.items()}
        if twice := next(iter(found.keys() & parts.keys()), None):
            message = f"two stored tensors, {stored} and {parts[twice].stored}, are both {twice}"
            raise OptimError(message, "fetch the model again", USAGE)
        parts |= found
    return parts, tuple(left_out)


def published_name(canonical: str, model_type: str) -> str:
    """The name that the family's published checkpoints use for a canonical one."""
    if model_type == NEOX:
        return re.sub(r"^lm_head\.", "embed_out.", canonical)
    if model_type not in W_STYLE:
        return canonical
    name = canonical.replace(".mlp.", ".block_sparse_moe.")
    for short, long in W_NAMES.items():
        name = re.sub(rf"(\.experts\.\d+)\.{long}\.", rf"\1.{short}.", name)
    return name
