"""What a family of decoders looks like inside a block: data, one row a family.

A *group* is a set of linears that read one tensor, and the module that made it. An input channel
of the readers may be scaled by s when the source's output channel is divided by s: nothing changes
before rounding, and rounding hurts the scaled-up channels less (AWQ, arXiv 2306.00978, 3.2). That
holds only if *every* reader is scaled; `optim.quant.fold` checks each group numerically on the
block at hand, so a wrong row here costs the group its scales, never the model its meaning.

Paths are relative to the block and name modules of transformers' modeling code. `*` stands for each
expert in turn: in both a source and its readers, for the same expert.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Group:
    """`source` (a norm, or a linear whose last rows feed the readers) -> `readers`.

    `unquantized` readers are scaled like the others and keep their dtype: a mixture's router.
    """

    source: str
    readers: tuple[str, ...]
    unquantized: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Decoder:
    """Where a family keeps its modules, and what `config.json` leaves unsaid.

    Block paths are relative to the block, the others to the model. A norm set to None is absent.
    What can be seen in the checkpoint (biases, per-head or full q/k norms) is not here.
    """

    embed: str = "model.embed_tokens"
    layers: str = "model.layers"
    norm: str = "model.norm"
    positions: str | None = None  # learned positions
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    interleaved: bool = False  # the rows of a fused qkv go head by head: q, k, v of head 0, ...
    out: str = "self_attn.o_proj"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    gated: bool = True
    attention_norms: tuple[str | None, str | None] = ("input_layernorm", None)  # before, after
    mlp_norms: tuple[str | None, str | None] = ("post_attention_layernorm", None)
    layer_norm: bool = False  # LayerNorm, else RMSNorm
    sliding: str | int = ""  # "all" layers; every layer but each n-th; "late", "nope": see shape.py
    scaled_embedding: bool = False  # embeddings are multiplied by sqrt(hidden)
    defaults: dict[str, Any] = field(default_factory=dict)  # config keys a file may leave out


@dataclass(frozen=True, slots=True)
class Family:
    """The fold groups of one family; `norm_offset` is 1 where a norm multiplies by (1 + weight)."""

    groups: tuple[Group, ...] = ()
    norm_offset: int = 0
    decoder: Decoder = field(default_factory=Decoder)


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
V_TO_O = Group("self_attn.v_proj", ("self_attn.o_proj",))
UP_TO_DOWN = Group("mlp.up_proj", ("mlp.down_proj",))

SANDWICH: dict[str, Any] = {
    "attention_norms": ("input_layernorm", "post_attention_layernorm"),
    "mlp_norms": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
}
GEMMA: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
PRE_NORM_GROUPS = (
    Group("input_layernorm", QKV),
    V_TO_O,
    Group("post_attention_layernorm", GATE_UP),
    UP_TO_DOWN,
)
MIXTURE_GROUPS = (
    Group("input_layernorm", QKV),
    V_TO_O,
    Group(
        "post_attention_layernorm",
        ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
        unquantized=("mlp.gate",),
    ),
    Group("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",)),
)


def pre_norm(**facts: Any) -> Family:
    return Family(PRE_NORM_GROUPS, decoder=Decoder(**facts))


def post_norm(**facts: Any) -> Family:
    return Family(
        (V_TO_O, UP_TO_DOWN),
        decoder=Decoder(
            attention_norms=(None, "post_attention_layernorm"),
            mlp_norms=(None, "post_feedforward_layernorm"),
            **facts,
        ),
    )


FAMILIES: dict[str, Family] = {
    "llama": pre_norm(),
    "mistral": pre_norm(sliding="all", defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": pre_norm(sliding="late", defaults={"num_key_value_heads": 32, "sliding_window": 4096}),
    "qwen3": pre_norm(
        sliding="late",
        defaults={"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
    ),
    "granite": pre_norm(),
    "smollm3": pre_norm(
        sliding="nope",
        defaults={
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "rope_theta": 2e6,
            "no_rope_layer_interval": 4,
        },
    ),
    "phi3": Family(
        groups=(
            Group("input_layernorm", ("self_attn.qkv_proj",)),
            Group("self_attn.qkv_proj", ("self_attn.o_proj",)),
            Group("post_attention_layernorm", ("mlp.gate_up_proj",)),
            Group("mlp.gate_up_proj", ("mlp.down_proj",)),
        ),
        decoder=Decoder(
            qkv=("self_attn.qkv_proj",),
            up=("mlp.gate_up_proj",),
            sliding="all",
            defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        ),
    ),
    "gemma2": Family(
        groups=(
            Group("input_layernorm", QKV),
            V_TO_O,
            Group("pre_feedforward_layernorm", GATE_UP),
            UP_TO_DOWN,
        ),
        norm_offset=1,
        decoder=Decoder(
            **SANDWICH,
            sliding=2,
            scaled_embedding=True,
            defaults=GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        ),
    ),
    # q_norm and k_norm follow q and k: scaling their input measured worse than plain rounding.
    "gemma3_text": Family(
        groups=(V_TO_O, Group("pre_feedforward_layernorm", GATE_UP), UP_TO_DOWN),
        norm_offset=1,
        decoder=Decoder(
            **SANDWICH,
            sliding=6,
            scaled_embedding=True,
            defaults=GEMMA | {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        ),
    ),
    "olmo2": post_norm(defaults={"rms_norm_eps": 1e-5}),
    "olmo3": post_norm(
        sliding=4, defaults={"rms_norm_eps": 1e-5, "rope_theta": 5e5, "sliding_window": 4096}
    ),
    "opt": Family(
        groups=(
            Group("self_attn_layer_norm", QKV),
            Group("self_attn.v_proj", ("self_attn.out_proj",)),
            Group("final_layer_norm", ("fc1",)),
            Group("fc1", ("fc2",)),  # legal: ReLU is positively homogeneous
        ),
        decoder=Decoder(
            embed="model.decoder.embed_tokens",
            layers="model.decoder.layers",
            norm="model.decoder.final_layer_norm",
            positions="model.decoder.embed_positions",
            out="self_attn.out_proj",
            up=("fc1",),
            down="fc2",
            gated=False,
            attention_norms=("self_attn_layer_norm", None),
            mlp_norms=("final_layer_norm", None),
            layer_norm=True,
            defaults={"activation_function": "relu", "tie_word_embeddings": True},
        ),
    ),
    "gpt_neox": Family(
        groups=(
            Group("input_layernorm", ("attention.query_key_value",)),
            Group("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        ),
        decoder=Decoder(
            embed="gpt_neox.embed_in",
            layers="gpt_neox.layers",
            norm="gpt_neox.final_layer_norm",
            qkv=("attention.query_key_value",),
            interleaved=True,
            out="attention.dense",
            up=("mlp.dense_h_to_4h",),
            down="mlp.dense_4h_to_h",
            gated=False,
            layer_norm=True,
            defaults={
                "hidden_act": "gelu",
                "use_parallel_residual": True,
                "partial_rotary_factor": 0.25,
            },
        ),
    ),
    "mixtral": Family(
        MIXTURE_GROUPS,
        decoder=Decoder(
            sliding="all",
            defaults={
                "rms_norm_eps": 1e-5,
                "rope_theta": 1e6,
                "num_key_value_heads": 8,
                "num_experts_per_tok": 2,
                "norm_topk_prob": True,
            },
        ),
    ),
    "qwen3_moe": Family(
        MIXTURE_GROUPS,
        decoder=Decoder(
            sliding="all",
            defaults={
                "num_key_value_heads": 4,
                "sliding_window": 4096,
                "use_sliding_window": False,
                "num_experts_per_tok": 8,
                "norm_topk_prob": False,
            },
        ),
    ),
}
