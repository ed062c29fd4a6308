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
    """Where a family keeps its modules, and which keys of its configuration it looks at.

    Block paths are relative to the block, the others to the model. A norm set to None is absent.
    Facts typed `str | bool` or `str | float` are a value, or the key of the configuration that has
    it: a key that a family does not read means nothing in its config.json.
    """

    config_class: str = "LlamaConfig"  # of transformers
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
    grouped: bool = True  # heads of keys and values, and their size, can be set
    head_norms: str = ""  # of queries and keys: "head" by head, or over the "whole" projection
    qkv_bias: str | bool = False
    out_bias: str | bool = False
    mlp_bias: str | bool = False
    attention_norms: tuple[str | None, str | None] = ("input_layernorm", None)  # before, after
    mlp_norms: tuple[str | None, str | None] = ("post_attention_layernorm", None)
    layer_norm: bool = False  # LayerNorm, else RMSNorm
    affine: str | bool = True  # whether a LayerNorm has a weight and a bias
    eps: str | float = "rms_norm_eps"
    activation: str = "hidden_act"
    inner: str = "intermediate_size"
    sliding: str = ""  # which layers have a window: "all", or those of that "type"
    rotates: str = ""  # the list that says which layers turn queries and keys
    partial_rotary: bool = False  # `partial_rotary_factor` of a head's channels are turned
    attention_scale: str = ""  # the key of the factor; of its root's inverse with `scalar`
    scalar: bool = False
    attention_cap: bool = False  # scores may be soft-capped
    logit_cap: bool = False
    multipliers: bool = False  # embedding, residual and logits are scaled
    scaled_embedding: bool = False  # embeddings are multiplied by sqrt(hidden)
    parallel: str | bool = False
    norm_before: str | bool = True  # False: norms come after the addition
    normalize_experts: str | bool = False
    mixture: bool = False


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
BIASED: dict[str, Any] = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}
GEMMA: dict[str, Any] = SANDWICH | {
    **BIASED,
    "activation": "hidden_activation",
    "sliding": "type",
    "attention_scale": "query_pre_attn_scalar",
    "scalar": True,
    "logit_cap": True,
    "scaled_embedding": True,
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
    "llama": pre_norm(**BIASED, mlp_bias="mlp_bias"),
    "mistral": pre_norm(config_class="MistralConfig", sliding="all"),
    "qwen2": pre_norm(config_class="Qwen2Config", qkv_bias=True, sliding="type"),
    "qwen3": pre_norm(config_class="Qwen3Config", **BIASED, head_norms="head", sliding="type"),
    "granite": pre_norm(
        config_class="GraniteConfig",
        **BIASED,
        mlp_bias="mlp_bias",
        attention_scale="attention_multiplier",
        multipliers=True,
    ),
    "smollm3": pre_norm(
        config_class="SmolLM3Config",
        **BIASED,
        mlp_bias="mlp_bias",
        sliding="type",
        rotates="no_rope_layers",
    ),
    "phi3": Family(
        groups=(
            Group("input_layernorm", ("self_attn.qkv_proj",)),
            Group("self_attn.qkv_proj", ("self_attn.o_proj",)),
            Group("post_attention_layernorm", ("mlp.gate_up_proj",)),
            Group("mlp.gate_up_proj", ("mlp.down_proj",)),
        ),
        decoder=Decoder(
            config_class="Phi3Config",
            qkv=("self_attn.qkv_proj",),
            up=("mlp.gate_up_proj",),
            sliding="all",
            partial_rotary=True,
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
        decoder=Decoder(config_class="Gemma2Config", **GEMMA, attention_cap=True),
    ),
    # q_norm and k_norm follow q and k: scaling their input measured worse than plain rounding.
    "gemma3_text": Family(
        groups=(V_TO_O, Group("pre_feedforward_layernorm", GATE_UP), UP_TO_DOWN),
        norm_offset=1,
        decoder=Decoder(config_class="Gemma3TextConfig", **GEMMA, head_norms="head"),
    ),
    "olmo2": post_norm(config_class="Olmo2Config", **BIASED, head_norms="whole"),
    "olmo3": post_norm(config_class="Olmo3Config", **BIASED, head_norms="whole", sliding="type"),
    "opt": Family(
        groups=(
            Group("self_attn_layer_norm", QKV),
            Group("self_attn.v_proj", ("self_attn.out_proj",)),
            Group("final_layer_norm", ("fc1",)),
            Group("fc1", ("fc2",)),  # legal: ReLU is positively homogeneous
        ),
        decoder=Decoder(
            config_class="OPTConfig",
            embed="model.decoder.embed_tokens",
            layers="model.decoder.layers",
            norm="model.decoder.final_layer_norm",
            positions="model.decoder.embed_positions",
            out="self_attn.out_proj",
            up=("fc1",),
            down="fc2",
            gated=False,
            grouped=False,
            qkv_bias="enable_bias",
            out_bias="enable_bias",
            mlp_bias="enable_bias",
            attention_norms=("self_attn_layer_norm", None),
            mlp_norms=("final_layer_norm", None),
            layer_norm=True,
            affine="layer_norm_elementwise_affine",
            eps=1e-5,
            activation="activation_function",
            inner="ffn_dim",
            norm_before="do_layer_norm_before",
        ),
    ),
    "gpt_neox": Family(
        groups=(
            Group("input_layernorm", ("attention.query_key_value",)),
            Group("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        ),
        decoder=Decoder(
            config_class="GPTNeoXConfig",
            embed="gpt_neox.embed_in",
            layers="gpt_neox.layers",
            norm="gpt_neox.final_layer_norm",
            qkv=("attention.query_key_value",),
            interleaved=True,
            out="attention.dense",
            up=("mlp.dense_h_to_4h",),
            down="mlp.dense_4h_to_h",
            gated=False,
            grouped=False,
            qkv_bias="attention_bias",
            out_bias="attention_bias",
            mlp_bias=True,
            layer_norm=True,
            eps="layer_norm_eps",
            partial_rotary=True,
            parallel="use_parallel_residual",
        ),
    ),
    "mixtral": Family(
        MIXTURE_GROUPS,
        decoder=Decoder(
            config_class="MixtralConfig", sliding="all", mixture=True, normalize_experts=True
        ),
    ),
    "qwen3_moe": Family(
        MIXTURE_GROUPS,
        decoder=Decoder(
            config_class="Qwen3MoeConfig",
            **BIASED,
            head_norms="head",
            sliding="all",
            mixture=True,
            normalize_experts="norm_topk_prob",
        ),
    ),
}
