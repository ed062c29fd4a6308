"""What a configuration says about a decoder: one `Shape` for the model, one `Layer` a block.

The configuration is transformers' own object (config.py), so defaults and nulls are resolved. Every
number is checked here: what leaves this module can be computed with.
"""

import math
from dataclasses import dataclass
from typing import Any

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.architecture.activations import activation
from optim.runtime.architecture.table import Decoder

WIDEST = 1 << 24  # of sizes: channels, rows of a table
LONGEST = 1 << 40  # of positions
CHECK = "check the file against the one the model was published with"


@dataclass(frozen=True, slots=True)
class Layer:
    """One block: its window (None: it sees everything), its rotary kind (None: no rotation)."""

    window: int | None
    rope: str | None
    mixture: bool = False


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers a decoder is built from."""

    vocab: int
    embed: int
    """Width of the embedding table; OPT projects some up to `hidden`."""
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    """Width of a feed-forward; of an expert: `expert_inner`."""
    layers: tuple[Layer, ...]
    eps: float
    activation: str
    threshold: float
    """Of `relu`: smaller values are 0 too (`hidden_act_param`, FATReLU)."""
    max_context: int
    tied: bool
    parallel: bool
    norm_after_add: bool
    final_norm: bool
    attention_scale: float
    attention_cap: float | None
    logit_cap: float | None
    embed_scale: float
    residual_scale: float
    logit_scale: float
    experts: int
    expert_inner: int
    experts_per_token: int
    normalize_experts: bool
    biased: frozenset[str]
    """Which linears have a bias: some of "qkv", "out", "mlp"."""
    affine: bool
    """Whether a LayerNorm has a weight and a bias."""


def resolve(config: Any, facts: Decoder) -> Shape:
    """The shape of the text model whose transformers configuration is `config`.

    Raises OptimError (2) naming a value that no such decoder can have.
    """
    hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    head_dim = _size(config, "head_dim") if _own(config, facts, "head_dim") else hidden // heads
    grouped = _own(config, facts, "num_key_value_heads")
    kv_heads = _size(config, "num_key_value_heads") if grouped else heads
    if heads % kv_heads or head_dim < 1:
        what = f"{heads} attention heads, {kv_heads} of keys and values, {hidden} channels"
        raise OptimError(f"config.json: {what} do not fit together", CHECK, USAGE)
    refuse_bidirectional(config)
    named = str(getattr(config, facts.activation))
    threshold = relu_threshold(getattr(config, "hidden_act_param", None))
    activation(named, threshold)  # known, or refused
    before = _flag(config, facts.norm_before)
    return Shape(
        vocab=_size(config, "vocab_size"),
        embed=_size(config, "word_embed_proj_dim") if facts.positions else hidden,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        inner=_size(config, facts.inner),
        layers=_layers(config, facts),
        eps=_number(config, facts.eps, least=0.0),
        activation=named,
        threshold=threshold,
        max_context=_size(config, "max_position_embeddings", LONGEST),
        tied=bool(config.tie_word_embeddings),
        parallel=_flag(config, facts.parallel),
        norm_after_add=not before,
        final_norm=before and not getattr(config, "_remove_final_layer_norm", False),
        attention_scale=_attention_scale(config, facts, head_dim),
        attention_cap=_cap(config, "attn_logit_softcapping", facts.attention_cap),
        logit_cap=_cap(config, "final_logit_softcapping", facts.logit_cap),
        embed_scale=math.sqrt(hidden)
        if facts.scaled_embedding
        else _multiplier(config, "embedding_multiplier", facts),
        residual_scale=_multiplier(config, "residual_multiplier", facts),
        logit_scale=1.0 / _multiplier(config, "logits_scaling", facts),
        **_mixture(config, facts),
        biased=_biased(config, facts),
        affine=_flag(config, facts.affine),
    )


def refuse_bidirectional(config: Any) -> None:
    """A model whose tokens see what follows them embeds text; it cannot go on with one."""
    if getattr(config, "use_bidirectional_attention", None):
        what = "config.json: use_bidirectional_attention, so the model does not generate text"
        raise OptimError(what, "choose a decoder-only language model", USAGE)


def relu_threshold(value: object) -> float:
    """`hidden_act_param` of a configuration: FATReLU's threshold, 0 where there is none.

    Raises OptimError (2) for what is no number from 0 on.
    """
    if value is None:
        return 0.0
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf"):
        return float(value)
    fix = "the size up to which ReLU's outputs count as zero, or leave it out"
    raise OptimError(f"config.json: hidden_act_param is {value!r}", fix, USAGE)


def _own(config: Any, facts: Decoder, key: str) -> bool:
    return facts.grouped and getattr(config, key, None) is not None


def _number(config: Any, key: str | float, least: float = -math.inf) -> float:
    """A finite number of the configuration, or a fact that is one already."""
    value = getattr(config, key, None) if isinstance(key, str) else key
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or value < least:  # type: ignore[arg-type, operator]
        raise OptimError(f"config.json: {key} is {value!r:.60}", CHECK, USAGE)
    return float(value)  # type: ignore[arg-type]


def _size(config: Any, key: str, most: int = WIDEST) -> int:
    value = getattr(config, key, None)
    if type(value) is not int or not 1 <= value <= most:
        raise OptimError(f"config.json: {key} is {value!r:.60}, not 1 to {most}", CHECK, USAGE)
    return value


def _flag(config: Any, fact: str | bool) -> bool:
    return bool(getattr(config, fact)) if isinstance(fact, str) else fact


def _cap(config: Any, key: str, read: bool) -> float | None:
    """A soft cap; null means none."""
    if not read or getattr(config, key, None) is None:
        return None
    if _number(config, key) <= 0:
        raise OptimError(f"config.json: {key} is {getattr(config, key)!r}", CHECK, USAGE)
    return _number(config, key)


def _multiplier(config: Any, key: str, facts: Decoder) -> float:
    value = _number(config, key) if facts.multipliers else 1.0
    if key == "logits_scaling" and value == 0:
        raise OptimError("config.json: logits_scaling is 0", CHECK, USAGE)
    return value


def _attention_scale(config: Any, facts: Decoder, head_dim: int) -> float:
    if not facts.attention_scale:
        return float(head_dim**-0.5)
    value = _number(config, facts.attention_scale)
    if facts.scalar and value <= 0:
        raise OptimError(f"config.json: {facts.attention_scale} is {value:g}", CHECK, USAGE)
    return value**-0.5 if facts.scalar else value


def _biased(config: Any, facts: Decoder) -> frozenset[str]:
    kinds = {"qkv": facts.qkv_bias, "out": facts.out_bias, "mlp": facts.mlp_bias}
    return frozenset(name for name, fact in kinds.items() if _flag(config, fact))


def _mixture(config: Any, facts: Decoder) -> dict[str, Any]:
    none = {"experts": 0, "expert_inner": 0, "experts_per_token": 0, "normalize_experts": False}
    if not facts.mixture:
        return none
    count, top = _size(config, "num_local_experts"), _size(config, "num_experts_per_tok")
    if top > count:
        what = f"config.json: num_experts_per_tok is {top}, of {count} experts"
        raise OptimError(what, CHECK, USAGE)
    own = "moe_intermediate_size"
    return {
        "experts": count,
        "expert_inner": _size(config, own if hasattr(config, own) else facts.inner),
        "experts_per_token": top,
        "normalize_experts": _flag(config, facts.normalize_experts),
    }


def _layers(config: Any, facts: Decoder) -> tuple[Layer, ...]:
    count = _size(config, "num_hidden_layers")
    types = getattr(config, "layer_types", None) if facts.sliding == "type" else None
    kinds = types or ["full_attention"] * count
    turned = getattr(config, facts.rotates) if facts.rotates else [1] * count
    if len(kinds) != count or len(turned) < count:
        raise OptimError(f"config.json: lists of layers are not {count} long", CHECK, USAGE)
    nested = config.nested_rope_parameter_keys(getattr(config, "rope_parameters", None) or {})
    layers = []
    for i, kind in enumerate(kinds):
        if kind not in ("full_attention", "sliding_attention"):
            raise OptimError(f"config.json: layer_types has {kind!r:.60}", CHECK, USAGE)
        rope = kind if nested else "full_attention"
        windowed = facts.sliding == "all" or kind == "sliding_attention"
        layers.append(
            Layer(
                window=_window(config, kind) if windowed else None,
                rope=rope if turned[i] and not facts.positions else None,
                mixture=facts.mixture and _mixes(config, i),
            )
        )
    return tuple(layers)


def _window(config: Any, kind: str) -> int | None:
    """How far a layer looks back; a layer of the kind that slides must know it."""
    if getattr(config, "sliding_window", None) is None and kind == "full_attention":
        return None
    return _size(config, "sliding_window", LONGEST)


def _mixes(config: Any, layer: int) -> bool:
    """Whether a block of a mixture is one: Qwen 3 can have plain ones among them."""
    every = getattr(config, "decoder_sparse_step", 1)
    plain = getattr(config, "mlp_only_layers", None) or ()
    if type(every) is not int or every < 1:
        raise OptimError(f"config.json: decoder_sparse_step is {every!r:.60}", CHECK, USAGE)
    return layer not in plain and (layer + 1) % every == 0
