"""Which tensors a model of the table has: the names and shapes that its configuration implies.

Names are canonical (storage/names.py): module paths of transformers' modeling code, an expert one
linear each. What a file stores beyond them is no part of the model, as transformers has it too.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from optim.runtime.architecture.shape import Layer, Shape
from optim.runtime.architecture.table import Decoder

POSITION_OFFSET = 2  # OPT's learned positions start at row 2


@dataclass(frozen=True, slots=True)
class Module:
    """A linear `[out, in]`, a table `[rows, width]` or a norm `[width]`, and its bias.

    `reads`: the norm whose output a linear takes, by name; None for one that reads something else.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    """`linear`, `table`, `norm`, or `head`: a linear that a tied table may stand for."""
    bias: bool = False
    weight: bool = True
    reads: str | None = None


def modules(shape: Shape, facts: Decoder) -> Iterator[Module]:
    """Every module with tensors, block by block, embeddings and head last."""
    for index, layer in enumerate(shape.layers):
        yield from _attention(shape, facts, f"{facts.layers}.{index}.")
        yield from _feed_forward(shape, facts, layer, f"{facts.layers}.{index}.")
    yield Module(facts.embed, (shape.vocab, shape.embed), "table")
    if facts.positions:
        rows = shape.max_context + POSITION_OFFSET
        yield Module(facts.positions, (rows, shape.hidden), "table")
    stem = facts.embed.rpartition(".")[0]
    if shape.embed != shape.hidden:
        yield Module(f"{stem}.project_in", (shape.hidden, shape.embed), "linear")
        yield Module(f"{stem}.project_out", (shape.embed, shape.hidden), "linear")
    if shape.final_norm:
        yield _norm(shape, facts, facts.norm, shape.hidden)
    yield Module("lm_head", (shape.vocab, shape.embed), "head")


def _norm(shape: Shape, facts: Decoder, name: str, width: int) -> Module:
    affine = shape.affine or not facts.layer_norm
    return Module(name, (width,), "norm", facts.layer_norm and affine, weight=affine)


def _attention(shape: Shape, facts: Decoder, path: str) -> Iterator[Module]:
    before, after = facts.attention_norms
    for norm in (before, after):
        if norm:
            yield _norm(shape, facts, path + norm, shape.hidden)
    heads, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    widths = (heads, kv, kv) if len(facts.qkv) == 3 else (heads + 2 * kv,)
    source = path + before if before else None
    bias = "qkv" in shape.biased
    for name, width in zip(facts.qkv, widths, strict=True):
        yield Module(path + name, (width, shape.hidden), "linear", bias, reads=source)
    bias = "out" in shape.biased
    yield Module(path + facts.out, (shape.hidden, heads), "linear", bias)
    if facts.head_norms:
        whole = facts.head_norms == "whole"
        for name, width in (("q_norm", heads), ("k_norm", kv)):
            width = width if whole else shape.head_dim
            yield Module(f"{path}self_attn.{name}", (width,), "norm")


def _feed_forward(shape: Shape, facts: Decoder, layer: Layer, path: str) -> Iterator[Module]:
    before, after = facts.mlp_norms
    for norm in (before, after):
        if norm:
            yield _norm(shape, facts, path + norm, shape.hidden)
    source = path + before if before else None
    if not layer.mixture:
        yield from _mlp(shape, facts, path, shape.inner, source)
        return
    yield Module(f"{path}mlp.gate", (shape.experts, shape.hidden), "linear", reads=source)
    for expert in range(shape.experts):
        inside = f"{path}mlp.experts.{expert}."
        for module in _mlp(shape, facts, "", shape.expert_inner, source):
            name = inside + module.name.removeprefix("mlp.")
            yield Module(name, module.shape, "linear", module.bias, reads=module.reads)


def _mlp(
    shape: Shape, facts: Decoder, path: str, inner: int, source: str | None
) -> Iterator[Module]:
    bias = "mlp" in shape.biased
    width = inner * (2 if facts.gated and len(facts.up) == 1 else 1)
    for name in facts.up:
        yield Module(path + name, (width, shape.hidden), "linear", bias, reads=source)
    yield Module(path + facts.down, (shape.hidden, inner), "linear", bias)
