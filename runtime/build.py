"""From a checkpoint to a decoder: tensors are read one at a time and go straight to their place.

Packed linears stay packed. Linears that read the same tensor (q, k, v; gate, up) become one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.architectures import FAMILIES, Family
from optim.runtime.architectures import Decoder as Facts
from optim.runtime.attention import Rule
from optim.runtime.checkpoint import Checkpoint
from optim.runtime.core_decoder import CoreDecoder, core_decoder
from optim.runtime.core_ffn import CoreFeedForward
from optim.runtime.decoder import Attention, Block, Decoder
from optim.runtime.formats.packed import SUFFIXES, Scheme, SchemeOf
from optim.runtime.formats.packed_linear import PackedLinear, fuse
from optim.runtime.formats.w4a4 import read_config
from optim.runtime.gated_ffn import GatedFeedForward, MaskedGate
from optim.runtime.kernels import cpu_step
from optim.runtime.kernels.cpu_columns import NOTHING
from optim.runtime.kernels.cpu_sparse import Columns, Rows
from optim.runtime.layers import (
    ACTIVATIONS,
    MLP,
    HeadNorm,
    LayerNorm,
    Mixture,
    Norm,
    RMSNorm,
    fatrelu,
)
from optim.runtime.linear import DenseLinear, Joined, held_dtype
from optim.runtime.machine import release_memory, use_huge_pages
from optim.runtime.offload import Offloaded
from optim.runtime.one_call import one_call
from optim.runtime.plain import schemes_of
from optim.runtime.plane_linear import Form, PlaneLinear, runs_here
from optim.runtime.rope import Rope, ropes
from optim.runtime.shape import Layer, Shape, resolve
from optim.runtime.side import Side, read_side
from optim.runtime.sparse import MaskedLinear, SparseLinear, sparse_dense, sparse_packed
from optim.runtime.static import StaticReader
from optim.runtime.static_decoder import complete

FeedForward = MLP | Mixture | CoreFeedForward | GatedFeedForward | MaskedGate


@dataclass(slots=True)
class Loader:
    """Reads tensors and linears of one checkpoint onto `device`; dense linears get `dtype`."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    side: Side | None = None
    form: Form = "planes"
    weight_bytes: int = field(default=0)
    static: StaticReader | None = field(init=False)
    _scheme_of: SchemeOf = field(init=False)

    def __post_init__(self) -> None:
        self._scheme_of = schemes_of(self.checkpoint)
        config = read_config(self.checkpoint.quantization)
        made = (self.checkpoint, config, self.device, self.dtype) if config else None
        self.static = StaticReader(*made) if made else None

    def has(self, name: str) -> bool:
        return name in self.checkpoint.tensors

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self.checkpoint.read(name).to(self.device, dtype)

    def weight(self, name: str) -> Tensor:
        """A dense matrix in the dtype that suits this machine."""
        stored = self.checkpoint.read(name)
        return stored.to(self.device, held_dtype(stored.dtype, self.dtype)).contiguous()

    def below(self, index: int, site: str) -> float | None:
        """The size up to which inputs of a site of block `index` are left out."""
        return None if self.side is None else self.side.blocks[index].thresholds.get(site)

    def linear(self, *names: str, below: float | None = None) -> nn.Module:
        """One module that computes the linears `names` side by side.

        Decoding, it leaves out inputs up to `below` in size.
        """
        if self.static is not None and self.static.has(names[0]):
            whole = self.static.linear(*names)
            self.weight_bytes += whole.nbytes
            return whole
        schemes = {self._scheme(name) for name in names}
        biased = [name for name in names if self.has(f"{name}.bias")]
        if len(schemes) > 1 or len(biased) not in (0, len(names)):
            return Joined([self.linear(name, below=below) for name in names])
        scheme = schemes.pop()
        if scheme is not None:
            return self._packed(names, scheme, below)
        weights = [self.weight(f"{name}.weight") for name in names]
        bias = torch.cat([self.tensor(f"{n}.bias", self.dtype) for n in biased]) if biased else None
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        del weights
        return self.dense(weight, bias, below)

    def dense(
        self, weight: Tensor, bias: Tensor | None = None, below: float | None = None
    ) -> nn.Module:
        """A plain linear; its bytes are added to those a token reads."""
        self.weight_bytes += weight.nbytes
        if below is not None and (sparse := sparse_dense(weight, bias, below)) is not None:
            return sparse
        if below is None and self._planes(weight):
            return self._as_planes(weight, bias)
        use_huge_pages(weight)
        linear = DenseLinear(weight, bias)
        return linear if below is None else MaskedLinear(linear, below)

    def table(self, name: str) -> Tensor | PlaneLinear:
        """An embedding table as it is stored, or as planes where the model is packed."""
        weight = self.tensor(name)
        return PlaneLinear(weight) if self._planes(weight) else weight

    def _planes(self, weight: Tensor) -> bool:
        """Whether a weight stays packed: that of a packed model, where a kernel reads planes."""
        packed = self.checkpoint.layout is not None and weight.dtype == torch.bfloat16
        return packed and self.form != "bf16" and runs_here(self.device)

    def _as_planes(self, weight: Tensor, bias: Tensor | None) -> PlaneLinear:
        linear = PlaneLinear(weight, bias, exact=self.form == "exact")
        self.weight_bytes += linear.nbytes - weight.nbytes
        return linear

    def _scheme(self, name: str) -> Scheme | None:
        return self._scheme_of(name) if self.has(f"{name}.weight_packed") else None

    def _packed(self, names: Sequence[str], scheme: Scheme, below: float | None) -> nn.Module:
        parts = []
        for name in names:
            tensors = {s: self.tensor(f"{name}.{s}") for s in SUFFIXES if self.has(f"{name}.{s}")}
            bias = self.tensor(f"{name}.bias") if self.has(f"{name}.bias") else None
            parts.append(PackedLinear(tensors, scheme, bias, name))
        linear = parts[0] if len(parts) == 1 else fuse(parts)
        if below is not None and (sparse := sparse_packed(linear, below)) is not None:
            self.weight_bytes += sparse.columns.nbytes
            return sparse
        self.weight_bytes += linear.prepare().nbytes
        return linear if below is None else MaskedLinear(linear, below)

    def norm(self, name: str, facts: Facts, eps: float, offset: int) -> Norm:
        """The norm module `name`; a LayerNorm without affine parameters has no tensors."""
        if self.static is not None and self.static.has(name):
            return self.static.norm(name, eps)

        def read(part: str) -> Tensor | None:
            key = f"{name}.{part}"
            return self.tensor(key, torch.float32) if self.has(key) else None

        weight = read("weight")
        if facts.layer_norm:
            return LayerNorm(weight, read("bias"), eps)
        if weight is None:
            weight = self.tensor(f"{name}.weight")  # says what is missing
        return RMSNorm(weight + offset if offset else weight, eps)


def build(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    *,
    form: Form = "planes",
    offload: bool = False,
) -> tuple[Decoder | CoreDecoder, int]:
    """The decoder of `checkpoint` and the bytes of weights that one token reads.

    `form` says how weights that were packed without loss are held: see plane_linear.Form. With
    `offload` blocks stay in the host's memory. Raises OptimError (2) for a tensor that is missing
    or does not fit the configuration.
    """
    config = checkpoint.text_config
    family = FAMILIES[config["model_type"]]
    facts = family.decoder
    shape = resolve(config, facts)
    loader = Loader(checkpoint, device, dtype, read_side(checkpoint), form)
    head = _own_head(loader, shape)
    blocks: Any = Offloaded(device) if offload else []
    for index in range(len(shape.layers)):
        blocks.append(_block(loader, family, shape, index))
        release_memory()  # what repacking took, before the next takes its own
    if isinstance(blocks, Offloaded):
        blocks.begin()
    embed, head = _ends(loader, facts, head)
    stem = facts.embed.rpartition(".")[0]
    decoder = Decoder(
        shape=_rounded(shape, facts, checkpoint.tensors[f"{facts.embed}.weight"].dtype),
        embed=embed,
        positions=loader.tensor(f"{facts.positions}.weight") if facts.positions else None,
        project_in=_optional(loader, f"{stem}.project_in"),
        ropes=_ropes(loader, facts, shape),
        blocks=blocks,
        norm=_final_norm(loader, family, shape),
        project_out=_optional(loader, f"{stem}.project_out"),
        head=head,
        dtype=dtype,
        cache_dtype=_cache_dtype(loader, checkpoint.tensors[f"{facts.embed}.weight"].dtype),
        one_call=one_call(blocks, shape),
    )
    if loader.static is not None:
        complete(decoder, loader.static)
    side = loader.side
    return decoder if side is None else core_decoder(decoder, side), loader.weight_bytes


def _cache_dtype(loader: Loader, stored: torch.dtype) -> torch.dtype:
    """Keys and values of a model of 16 bits take 16: on a CPU fp16, if the C kernel reads it."""
    if loader.device.type != "cpu":
        return loader.dtype
    short = stored != torch.float32 and cpu_step.usable() and cpu_step.reads_half()
    return torch.float16 if short else loader.dtype


def _ropes(loader: Loader, facts: Facts, shape: Shape) -> dict[str, Rope]:
    if facts.positions:
        return {}
    checkpoint = loader.checkpoint
    made = ropes(checkpoint.text_config, facts.defaults, shape.head_dim, checkpoint.hf_config)
    return {kind: rope.to(loader.device) for kind, rope in made.items()}


def _rounded(shape: Shape, facts: Facts, stored: torch.dtype) -> Shape:
    """Gemma multiplies by sqrt(hidden) as its own dtype holds it: 55.5, not 55.43, in bf16."""
    if not facts.scaled_embedding:
        return shape
    return replace(shape, embed_scale=float(torch.tensor(shape.embed_scale, dtype=stored)))


def _own_head(loader: Loader, shape: Shape) -> nn.Module | None:
    """A head that is not the embedding table. Repacking it takes the most: it comes first."""
    stored = {name.partition(".")[0] for name in loader.checkpoint.tensors}
    packed = "lm_head" in stored and not loader.has("lm_head.weight")
    return loader.linear("lm_head") if packed or not shape.tied else None


def _ends(
    loader: Loader, facts: Facts, head: nn.Module | None
) -> tuple[Tensor | PlaneLinear, nn.Module]:
    """The embedding table and the head; a tied pair shares one tensor."""
    name = f"{facts.embed}.weight"
    if head is not None:
        return loader.table(name), head
    table = loader.weight(name)
    head = loader.dense(table)
    return head if isinstance(head, PlaneLinear) else table, head


def _optional(loader: Loader, name: str) -> nn.Module | None:
    return loader.linear(name) if loader.has(f"{name}.weight") else None


def _final_norm(loader: Loader, family: Family, shape: Shape) -> Norm | None:
    facts = family.decoder
    if facts.layer_norm and not loader.has(f"{facts.norm}.weight"):
        return None  # OPT-350m normalizes inside its blocks only
    return loader.norm(facts.norm, facts, shape.eps, family.norm_offset)


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
    path = f"{facts.layers}.{index}"
    return Attention(
        qkv=loader.linear(*(f"{path}.{n}" for n in facts.qkv), below=loader.below(index, "qkv")),
        out=loader.linear(f"{path}.{facts.out}", below=loader.below(index, "out")),
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        interleaved=facts.interleaved,
        norm=_head_norm(loader, f"{path}.self_attn", shape, family.norm_offset),
        rope=layer.rope,
        rule=Rule(shape.attention_scale, layer.window, shape.attention_cap),
        one_token=_one_token(loader, shape, layer),
    )


def _one_token(loader: Loader, shape: Shape, layer: Layer) -> cpu_step.Attend | None:
    """The C kernel for decode steps, where it can be used."""
    if loader.device.type != "cpu" or loader.dtype != torch.float32 or not cpu_step.usable():
        return None
    if shape.head_dim % cpu_step.LANES:
        return None
    sizes = shape.heads, shape.kv_heads, shape.head_dim
    return cpu_step.Attend(*sizes, shape.attention_scale, layer.window, shape.attention_cap or 0.0)


def _head_norm(loader: Loader, path: str, shape: Shape, offset: int) -> HeadNorm | None:
    if not loader.has(f"{path}.q_norm.weight"):
        return None
    query = loader.tensor(f"{path}.q_norm.weight", torch.float32) + offset
    key = loader.tensor(f"{path}.k_norm.weight", torch.float32) + offset
    return HeadNorm(query, key, shape.eps, full=query.numel() != shape.head_dim)


def _feed_forward(loader: Loader, facts: Facts, shape: Shape, index: int) -> FeedForward:
    path = f"{facts.layers}.{index}"
    if not loader.has(f"{path}.mlp.gate.weight"):
        return _mlp(loader, facts, shape, index)
    router = loader.linear(f"{path}.mlp.gate")
    before = loader.weight_bytes
    experts = [
        _expert(loader, facts, shape, f"{path}.mlp.experts.{i}") for i in range(shape.experts)
    ]
    read = (loader.weight_bytes - before) * shape.experts_per_token // shape.experts
    loader.weight_bytes = before + read
    return Mixture(router, experts, shape.experts_per_token, shape.normalize_experts)


def _mlp(loader: Loader, facts: Facts, shape: Shape, index: int) -> FeedForward:
    """The feed-forward of a block, with the rules of its side file."""
    path = f"{facts.layers}.{index}"
    rules = None if loader.side is None else loader.side.blocks[index]
    if rules is not None and rules.gate is not None and facts.gated:
        return _gated(loader, facts, shape, path, rules.gate)
    core = None if rules is None else rules.core
    by_input = core is not None and loader.device.type == "cpu"
    below = NOTHING if by_input else loader.below(index, "down")
    if rules is not None and rules.gate is not None:
        below = rules.gate
    mlp = MLP(
        up=loader.linear(*(f"{path}.{n}" for n in facts.up), below=loader.below(index, "up")),
        down=loader.linear(f"{path}.{facts.down}", below=below),
        act=_activation(shape.activation, shape.threshold),
        gated=facts.gated,
    )
    if core is None or loader.side is None:
        return mlp
    return CoreFeedForward(mlp, core, loader.side)


def _gated(
    loader: Loader, facts: Facts, shape: Shape, path: str, threshold: float
) -> GatedFeedForward | MaskedGate:
    """A feed-forward that leaves out what its gate makes small."""
    act = _activation(shape.activation, shape.threshold)
    gate, up = (f"{path}.{name}" for name in facts.up)
    down = loader.linear(f"{path}.{facts.down}", below=0.0)
    columns = down.columns if isinstance(down, SparseLinear) else None
    if not isinstance(columns, Columns) or not loader.has(f"{up}.weight"):
        return MaskedGate(loader.linear(gate, up), down, act, threshold)
    weight = loader.weight(f"{up}.weight")
    bias = loader.tensor(f"{up}.bias") if loader.has(f"{up}.bias") else None
    loader.weight_bytes += weight.nbytes
    return GatedFeedForward(loader.linear(gate), Rows(weight, bias), columns, act, threshold)


def _expert(loader: Loader, facts: Facts, shape: Shape, path: str) -> MLP:
    """The feed-forward of one expert, whose paths lack the `mlp.`"""
    up = tuple(name.removeprefix("mlp.") for name in facts.up)
    down = facts.down.removeprefix("mlp.")
    return MLP(
        up=loader.linear(*(f"{path}.{name}" for name in up)),
        down=loader.linear(f"{path}.{down}"),
        act=_activation(shape.activation, shape.threshold),
        gated=facts.gated,
    )


def _activation(name: str, threshold: float) -> Callable[[Tensor], Tensor]:
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise OptimError(f"activation {name!r} is not known", f"known are: {known}", USAGE)
    if name == "relu" and threshold > 0:
        return partial(fatrelu, threshold=threshold)
    return ACTIVATIONS[name]
