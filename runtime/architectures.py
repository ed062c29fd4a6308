"""What a family of decoders looks like inside a block: data, one row a family.

A *group* is a set of linears that read one tensor, and the module that made it. An input channel of
the readers may be scaled by s when the source's output channel is divided by s: nothing changes
before rounding, and rounding hurts the scaled-up channels less (AWQ, arXiv 2306.00978, section 3.2).
That holds only if *every* reader is scaled; `optim.quant.fold` checks each group numerically on the
block at hand, so a wrong row here costs the group its scales, never the model its meaning.

Paths are relative to the block and name modules of transformers' modeling code. `*` stands for each
expert in turn: in both a source and its readers, for the same expert.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Group:
    """`source` (a norm, or a linear whose last rows feed the readers) -> `readers`.

    `unquantized` readers are scaled like the others and stay in their own dtype: a mixture's router.
    """

    source: str
    readers: tuple[str, ...]
    unquantized: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Family:
    """The fold groups of one family; `norm_offset` is 1 where a norm multiplies by (1 + weight)."""

    groups: tuple[Group, ...] = ()
    norm_offset: int = 0


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
V_TO_O = Group("self_attn.v_proj", ("self_attn.o_proj",))
UP_TO_DOWN = Group("mlp.up_proj", ("mlp.down_proj",))

LLAMA = Family(
    groups=(
        Group("input_layernorm", QKV),
        V_TO_O,
        Group("post_attention_layernorm", GATE_UP),
        UP_TO_DOWN,
    )
)
POST_NORM = Family(groups=(V_TO_O, UP_TO_DOWN))
MIXTURE = Family(
    groups=(
        Group("input_layernorm", QKV),
        V_TO_O,
        Group(
            "post_attention_layernorm",
            ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
            unquantized=("mlp.gate",),
        ),
        Group("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",)),
    )
)

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "granite": LLAMA,
    "smollm3": LLAMA,
    "phi3": Family(
        groups=(
            Group("input_layernorm", ("self_attn.qkv_proj",)),
            Group("self_attn.qkv_proj", ("self_attn.o_proj",)),
            Group("post_attention_layernorm", ("mlp.gate_up_proj",)),
            Group("mlp.gate_up_proj", ("mlp.down_proj",)),
        )
    ),
    "gemma2": Family(
        groups=(
            Group("input_layernorm", QKV),
            V_TO_O,
            Group("pre_feedforward_layernorm", GATE_UP),
            UP_TO_DOWN,
        ),
        norm_offset=1,
    ),
    # q_norm and k_norm follow q and k: scaling their input measured worse than plain rounding.
    "gemma3_text": Family(
        groups=(V_TO_O, Group("pre_feedforward_layernorm", GATE_UP), UP_TO_DOWN),
        norm_offset=1,
    ),
    "olmo2": POST_NORM,
    "olmo3": POST_NORM,
    "opt": Family(
        groups=(
            Group("self_attn_layer_norm", QKV),
            Group("self_attn.v_proj", ("self_attn.out_proj",)),
            Group("final_layer_norm", ("fc1",)),
            Group("fc1", ("fc2",)),  # legal: ReLU is positively homogeneous
        )
    ),
    "gpt_neox": Family(
        groups=(
            Group("input_layernorm", ("attention.query_key_value",)),
            Group("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        )
    ),
    "mixtral": MIXTURE,
    "qwen3_moe": MIXTURE,
}
