"""From a checkpoint to a decoder: the blocks of its family, and what stands before and after."""

from dataclasses import replace
from typing import Any

import torch

from optim.runtime.architecture.activations import activation
from optim.runtime.architecture.rope import ropes
from optim.runtime.architecture.shape import Layer, Shape, resolve
from optim.runtime.architecture.table import FAMILIES, Family
from optim.runtime.architecture.table import Decoder as Facts
from optim.runtime.cache.attention import Rule
from optim.runtime.decoder.attention import Attention
from optim.runtime.decoder.c_decode import one_call, shortlist_of
from optim.runtime.decoder.decoder import Block, Decoder
from optim.runtime.decoder.layers import MLP, FeedForward, Mixture, Norm
from optim.runtime.decoder.linears.base import Linear, Table
from optim.runtime.decoder.linears.source import Form
from optim.runtime.decoder.linears.static_int import static_reader
from optim.runtime.decoder.offload import Offloaded
from optim.runtime.engine.loader import Loader
from optim.runtime.engine.static import complete
from optim.runtime.kernels.cpu import step
from optim.runtime.kernels.cpu.skip_int4 import NOTHING
from optim.runtime.sparsity.core_decoder import CoreDecoder, core_decoder
from optim.runtime.sparsity.core_ffn import CoreFeedForward
from optim.runtime.sparsity.gated_ffn import gated_feed_forward
from optim.runtime.sparsity.side_file import read_side
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.system.memory import release_memory

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def build(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    *,
    form: Form = "planes",
    offload: bool = False,
) -> tuple[Decoder | CoreDecoder, int]:
    """The decoder of `checkpoint` and the bytes of weights that one token reads.

    `form` says how weights that were packed without loss are held: see linears/source.Form. With
    `offload` blocks stay in the host's memory. Raises OptimError (2) for a tensor that is missing
    or does not fit the configuration.
    """
    family = FAMILIES[checkpoint.family]
    facts = family.decoder
    shape = resolve(checkpoint.settings, facts)
    angles = ropes(checkpoint.settings, facts, shape.head_dim)
    loader = Loader(checkpoint, device, dtype, form, side=read_side(checkpoint))
    head, weight_bytes = _own_head(loader, facts, shape), 0
    blocks: Any = Offloaded(device) if offload else []
    for index in range(len(shape.layers)):
        block = _block(loader, family, shape, index)
        weight_bytes += block.nbytes
        blocks.append(block)
        release_memory()  # what repacking took, before the next takes its own
    if isinstance(blocks, Offloaded):
        blocks.begin()
    embed, head = _ends(loader, facts, head)
    stem = facts.embed.rpartition(".")[0]
    project_in, project_out = (_optional(loader, f"{stem}.project_{way}") for way in ("in", "out"))
    decoder = Decoder(
        shape=_rounded(shape, facts, _stored_dtype(checkpoint, facts)),
        embed=embed,
        positions=loader.tensor(f"{facts.positions}.weight") if facts.positions else None,
        project_in=project_in,
        ropes={kind: rope.to(device) for kind, rope in angles.items()},
        blocks=blocks,
        norm=loader.norm(facts.norm, facts, shape.eps, family.norm_offset)
        if shape.final_norm
        else None,
        project_out=project_out,
        head=head,
        dtype=dtype,
        cache_dtype=_cache_dtype(loader, _stored_dtype(checkpoint, facts)),
        one_call=one_call(blocks, shape),
    )
    if decoder.one_call is not None:
        decoder.shortlist = shortlist_of(head, shape, weight_bytes)
    ends = (project_in, project_out, head)
    weight_bytes += sum(linear.nbytes for linear in ends if linear is not None)
    if (static := loader.once(static_reader)) is not None:
        complete(decoder, static)
    side = loader.side
    return decoder if side is None else core_decoder(decoder, side), weight_bytes


def _stored_dtype(checkpoint: Checkpoint, facts: Facts) -> torch.dtype:
    """What the model's floats are stored in: the embedding's; of a packed one, what is said."""
    if f"{facts.embed}.weight" in checkpoint.tensors:
        return checkpoint.tensors[f"{facts.embed}.weight"].dtype
    said = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"))
    return DTYPES.get(said, checkpoint.tensors[f"{facts.embed}.weight_scale"].dtype)


def _cache_dtype(loader: Loader, stored: torch.dtype) -> torch.dtype:
    """Keys and values of a model of 16 bits take 16: on a CPU fp16, if the C kernel reads it."""
    if loader.device.type != "cpu":
        return loader.dtype
    short = stored != torch.float32 and step.usable() and step.reads_half()
    return torch.float16 if short else loader.dtype


def _rounded(shape: Shape, facts: Facts, stored: torch.dtype) -> Shape:
    """Gemma multiplies by sqrt(hidden) as its own dtype holds it: 55.5, not 55.43, in bf16."""
    if not facts.scaled_embedding:
        return shape
    return replace(shape, embed_scale=float(torch.tensor(shape.embed_scale, dtype=stored)))


def _own_head(loader: Loader, facts: Facts, shape: Shape) -> Linear | None:
    """A head that is not the embedding table. Repacking it takes the most: it comes first.

    A stored head that differs from the table is the model's own, whatever is said about a tie, as
    transformers has it.
    """
    name, table = "lm_head.weight", f"{facts.embed}.weight"
    if loader.has(name) and shape.tied:
        read = loader.checkpoint.read
        if torch.equal(read(name), read(table)):
            return None
    stored = {name.partition(".")[0] for name in loader.checkpoint.tensors}
    return loader.linear("lm_head") if "lm_head" in stored else None


def _ends(loader: Loader, facts: Facts, head: Linear | None) -> tuple[Table, Linear]:
    """The embedding table and the head; a tied pair shares one tensor."""
    if head is not None:
        return loader.table(facts.embed), head
    head = loader.linear(facts.embed)
    table = head.table
    return loader.table(facts.embed) if table is None else table, head


def _optional(loader: Loader, name: str) -> Linear | None:
    return loader.linear(name) if loader.has(f"{name}.weight") else None


def _block(loader: Loader, family: Family, shape: Shape, index: int) -> Block:
    facts, path = family.decoder, f"{family.decoder.layers}.{index}"

    def norm(name: str | None) -> Norm | None:
        if name is None:
            return None
        return loader.norm(f"{path}.{name}", facts, shape.eps, family.norm_offset)

    return Block(
        attention=_attention(loader, family, shape, index),
        mlp=_feed_forward(loader, facts, shape, index),
        before_attention=norm(facts.attention_norms[0]),
        after_attention=norm(facts.attention_norms[1]),
        before_mlp=norm(facts.mlp_norms[0]),
        after_mlp=norm(facts.mlp_norms[1]),
        parallel=shape.parallel,
        residual_scale=shape.residual_scale,
        norm_after_add=shape.norm_after_add,
    )


def _attention(loader: Loader, family: Family, shape: Shape, index: int) -> Attention:
    facts, layer = family.decoder, shape.layers[index]
    path, below = f"{facts.layers}.{index}", loader.rules(index).thresholds
    return Attention(
        qkv=loader.linear(*(f"{path}.{n}" for n in facts.qkv), below=below.get("qkv")),
        out=loader.linear(f"{path}.{facts.out}", below=below.get("out")),
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        interleaved=facts.interleaved,
        norm=loader.head_norm(f"{path}.self_attn", shape.head_dim, shape.eps, family.norm_offset),
        rope=layer.rope,
        rule=Rule(shape.attention_scale, layer.window, shape.attention_cap),
        one_token=_one_token(loader, shape, layer),
    )


def _one_token(loader: Loader, shape: Shape, layer: Layer) -> step.Attend | None:
    """The C kernel for decode steps, where it can be used."""
    if loader.device.type != "cpu" or loader.dtype != torch.float32 or not step.usable():
        return None
    if shape.head_dim % step.LANES:
        return None
    sizes = shape.heads, shape.kv_heads, shape.head_dim
    return step.Attend(*sizes, shape.attention_scale, layer.window, shape.attention_cap or 0.0)


def _feed_forward(loader: Loader, facts: Facts, shape: Shape, index: int) -> FeedForward:
    path = f"{facts.layers}.{index}"
    if not loader.has(f"{path}.mlp.gate.weight"):
        return _mlp(loader, facts, shape, index)
    router = loader.linear(f"{path}.mlp.gate")
    experts = [
        _expert(loader, facts, shape, f"{path}.mlp.experts.{i}") for i in range(shape.experts)
    ]
    return Mixture(router, experts, shape.experts_per_token, shape.normalize_experts)


def _mlp(loader: Loader, facts: Facts, shape: Shape, index: int) -> FeedForward:
    """The feed-forward of a block, with the rules of its side file."""
    path, rules = f"{facts.layers}.{index}", loader.rules(index)
    up, down = tuple(f"{path}.{name}" for name in facts.up), f"{path}.{facts.down}"
    act = activation(shape.activation, shape.threshold)
    if rules.gate is not None and facts.gated:
        return gated_feed_forward(loader.linear, up, down, act, rules.gate)
    by_input = rules.core is not None and loader.device.type == "cpu"
    below = NOTHING if by_input else rules.thresholds.get("down")
    if rules.gate is not None:
        below = rules.gate
    mlp = MLP(
        up=loader.linear(*up, below=rules.thresholds.get("up")),
        down=loader.linear(down, below=below),
        act=act,
        gated=facts.gated,
    )
    if rules.core is None or loader.side is None:
        return mlp
    return CoreFeedForward(mlp, rules.core, loader.side)


def _expert(loader: Loader, facts: Facts, shape: Shape, path: str) -> MLP:
    """The feed-forward of one expert, whose paths lack the `mlp.`"""
    up = tuple(name.removeprefix("mlp.") for name in facts.up)
    down = facts.down.removeprefix("mlp.")
    return MLP(
        up=loader.linear(*(f"{path}.{name}" for name in up)),
        down=loader.linear(f"{path}.{down}"),
        act=activation(shape.activation, shape.threshold),
        gated=facts.gated,
    )
