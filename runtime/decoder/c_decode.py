"""Which decoders can send one token through all their blocks in one C call, and how.

Packed linears that the W4A8 kernel runs, or that are read input by input; RMS norms, a gated
feed-forward, blocks in sequence. The others, and batches, long inputs and other caches, go block by
block.
"""

from collections.abc import Sequence

from torch import Tensor

from optim.runtime.architecture.shape import Shape
from optim.runtime.decoder.decoder import Block
from optim.runtime.decoder.layers import Norm, RMSNorm
from optim.runtime.decoder.linears.base import Linear
from optim.runtime.kernels.compile import NoKernel
from optim.runtime.kernels.cpu import decode, shortlist
from optim.runtime.kernels.cpu.dense import Dense

ACTIVATIONS = {"silu": False, "swish": False, "gelu_pytorch_tanh": True, "gelu_new": True}

WORTH = 0.1
"""A head's share of what a token reads, below which an 8-bit copy is not worth its memory."""


class _Other(Exception):
    """This decoder has a part that the C code lacks."""


def one_call(blocks: Sequence[Block], shape: Shape) -> decode.Blocks | None:
    """`blocks` as the C code runs them; None if it cannot."""
    try:
        _need(shape.activation in ACTIVATIONS and not shape.parallel and not shape.norm_after_add)
        weights = [_weights(block) for block in blocks]
        _need(len({_eps(block) for block in blocks}) == 1)
        sizes = decode.Sizes(
            hidden=shape.hidden,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            dim=shape.head_dim,
            eps=_eps(blocks[0]),
            scale=shape.attention_scale,
            cap=shape.attention_cap or 0.0,
            residual=shape.residual_scale,
            tanh_gelu=ACTIVATIONS[shape.activation],
        )
        return decode.Blocks(weights, sizes)
    except (_Other, NoKernel):
        return None


def shortlist_of(head: Linear, shape: Shape, others: int) -> shortlist.Shortlist | None:
    """`head` for steps that need its largest outputs only; None where that cannot be, or gains
    little. `others`: bytes of the other weights that a token reads."""
    reader = head.c_reader
    if reader is None or not isinstance(reader.weight, Dense) or reader.weight.biased:
        return None
    changed = shape.logit_cap is not None or shape.logit_scale != 1  # two may become equal by it
    if changed or head.nbytes < WORTH * (head.nbytes + others) or not shortlist.usable():
        return None
    return shortlist.Shortlist(reader.weight)


def _need(fact: bool) -> None:
    if not fact:
        raise _Other


def _weights(block: Block) -> decode.BlockWeights:
    attention, mlp = block.attention, block.mlp.running
    _need(attention.one_token is not None and not attention.interleaved)
    _need(attention.norm is None or not attention.norm.full)
    if mlp is None or not mlp.gated:
        raise _Other
    return decode.BlockWeights(
        before_attention=_always(block.before_attention),
        after_attention=_rms(block.after_attention),
        before_mlp=_always(block.before_mlp),
        after_mlp=_rms(block.after_mlp),
        query_norm=attention.norm.query if attention.norm else None,
        key_norm=attention.norm.key if attention.norm else None,
        qkv=_reader(attention.qkv),
        out=_reader(attention.out),
        up=_reader(mlp.up),
        down=_reader(mlp.down),
        rope=attention.rope,
        window=attention.rule.window,
    )


def _reader(linear: Linear) -> decode.Reader:
    reader = linear.c_reader
    if reader is None:
        raise _Other
    return reader


def _rms(norm: Norm | None) -> Tensor | None:
    if norm is not None and not isinstance(norm, RMSNorm):
        raise _Other
    return None if norm is None else norm.weight


def _always(norm: Norm | None) -> Tensor:
    weight = _rms(norm)
    if weight is None:
        raise _Other
    return weight


def _eps(block: Block) -> float:
    return block.before_mlp.eps if block.before_mlp else 0.0
