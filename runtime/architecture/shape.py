"""What config.json says about a decoder, resolved: one `Shape` for the model, one `Layer` a block.

Configurations leave out what their family's class would fill in, and spell one fact in several ways
(`rope_theta` or `rope_parameters`, `layer_types` or a pattern). This is the one place that knows.
"""

import math
from dataclasses import dataclass
from typing import Any

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.architecture.table import Decoder
from optim.runtime.decoder.layers import relu_threshold

DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "layer_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "partial_rotary_factor": 1.0,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "norm_topk_prob": True,
    "do_layer_norm_before": True,
}


@dataclass(frozen=True, slots=True)
class Layer:
    """One block: its window (None: it sees everything), its rotary kind (None: no rotation)."""

    window: int | None
    rope: str | None


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers a decoder is built from."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: tuple[Layer, ...]
    eps: float
    activation: str
    threshold: float
    """Of `relu`: smaller values are 0 too (`hidden_act_param`, FATReLU)."""
    max_context: int
    tied: bool
    parallel: bool
    norm_after_add: bool
    attention_scale: float
    attention_cap: float | None
    logit_cap: float | None
    embed_scale: float
    residual_scale: float
    logit_scale: float
    experts: int
    experts_per_token: int
    normalize_experts: bool


def resolve(config: dict[str, Any], facts: Decoder) -> Shape:
    """Read a text model's `config` dict.

    Raises OptimError (2) if a number the family needs is missing or no number.
    """
    c = DEFAULTS | facts.defaults | {k: v for k, v in config.items() if v is not None}
    try:
        return _resolve(c, facts)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise OptimError(
            f"config.json does not describe a {config.get('model_type')} model: {error}",
            "check the file against the one the model was published with",
            USAGE,
        ) from error


def _resolve(c: dict[str, Any], facts: Decoder) -> Shape:
    hidden, heads = int(c["hidden_size"]), int(c["num_attention_heads"])
    head_dim = int(c.get("head_dim") or hidden // heads)
    scalar = c.get("query_pre_attn_scalar", head_dim)
    return Shape(
        hidden=hidden,
        heads=heads,
        kv_heads=int(c.get("num_key_value_heads", heads)),
        head_dim=head_dim,
        layers=_layers(c, facts),
        eps=float(c["layer_norm_eps" if facts.layer_norm else "rms_norm_eps"]),
        activation=c.get("hidden_activation") or c.get("activation_function") or c["hidden_act"],
        threshold=relu_threshold(c.get("hidden_act_param")),
        max_context=int(c["max_position_embeddings"]),
        tied=bool(c["tie_word_embeddings"]),
        parallel=bool(c.get("use_parallel_residual", False)),
        norm_after_add=not c["do_layer_norm_before"],
        attention_scale=float(c.get("attention_multiplier", scalar**-0.5)),
        attention_cap=c.get("attn_logit_softcapping"),
        logit_cap=c.get("final_logit_softcapping"),
        embed_scale=math.sqrt(hidden)
        if facts.scaled_embedding
        else float(c.get("embedding_multiplier", 1.0)),
        residual_scale=float(c.get("residual_multiplier", 1.0)),
        logit_scale=1.0 / float(c.get("logits_scaling", 1.0)),
        experts=int(c.get("num_local_experts") or c.get("num_experts") or 0),
        experts_per_token=int(c.get("num_experts_per_tok", 0)),
        normalize_experts=bool(c["norm_topk_prob"]),
    )


def _layers(c: dict[str, Any], facts: Decoder) -> tuple[Layer, ...]:
    count = int(c["num_hidden_layers"])
    no_rope = c.get("no_rope_layers")
    interval = c.get("no_rope_layer_interval")
    rotates = no_rope or [not interval or (i + 1) % interval for i in range(count)]
    sliding = _sliding(c, facts.sliding, count, [bool(r) for r in rotates])
    per_kind = "rope_local_base_freq" in c or "sliding_attention" in (
        c.get("rope_parameters") or {}
    )
    layers = []
    for i in range(count):
        kind = "sliding_attention" if sliding[i] and per_kind else "full_attention"
        rope = None if facts.positions or not rotates[i] else kind
        layers.append(Layer(int(c["sliding_window"]) if sliding[i] else None, rope))
    return tuple(layers)


def _sliding(c: dict[str, Any], rule: str | int, count: int, rotates: list[bool]) -> list[bool]:
    """Which blocks look through a window.

    `rule`: "all"; n: all but each n-th; "late": from `max_window_layers` on; "nope": those without
    rotary positions. `use_sliding_window: false` and a missing window switch it off.
    """
    optional = rule in ("late", "nope")
    if not rule or not c.get("sliding_window") or not c.get("use_sliding_window", not optional):
        return [False] * count
    if rule == "all":
        return [True] * count
    if types := c.get("layer_types"):
        return [kind == "sliding_attention" for kind in types]
    if rule == "late":
        return [i >= c.get("max_window_layers", 28) for i in range(count)]
    if rule == "nope":
        return [not r for r in rotates]
    period = int(c.get("sliding_window_pattern", rule))
    return [(i + 1) % period != 0 for i in range(count)]
