"""Rotary embeddings in GGUF: keys, and tables of factors where a kind of scaling has no key."""

import math
from typing import Any

import torch
from torch import Tensor

from optim.export.exporter import refuse
from optim.export.gguf.families import PLAIN_MODEL, Pairs, Row
from optim.runtime.architecture.shape import Shape
from optim.runtime.storage.dense_view import PlainView


def rope(model: PlainView, shape: Shape, row: Row) -> tuple[Pairs, dict[str, Tensor]]:
    """The keys (without the architecture's prefix) and the tables, F32 `[dim / 2]`.

    Raises OptimError (2) for a kind of scaling that has no place in the format.
    """
    settings = model.checkpoint.settings
    found = settings.rope_parameters
    kinds = settings.nested_rope_parameter_keys(found)
    main: dict[str, Any] = found["full_attention"] if kinds else found
    dim = int(shape.head_dim * float(main.get("partial_rotary_factor") or 1.0))
    pairs: Pairs = {"rope.freq_base": float(main["rope_theta"]), "rope.dimension_count": dim}
    if kinds and "sliding_attention" in kinds:
        pairs |= _of_windows(model, row, main, found["sliding_attention"])
    kind = main.get("rope_type", "default")
    if kind == "default":
        return pairs, {}
    if kind == "llama3":
        return pairs, {"rope_freqs.weight": _llama3(main, dim)}
    if kind == "longrope" and row.arch == "phi3":
        return _longrope(pairs, main, shape)
    if kind not in ("linear", "yarn"):
        raise refuse(model, f"GGUF has no rotary scaling of the kind {kind!r}", PLAIN_MODEL)
    pairs |= {"rope.scaling.type": kind, "rope.scaling.factor": float(main["factor"])}
    original = main.get("original_max_position_embeddings")
    if kind == "yarn" and original:
        pairs["rope.scaling.original_context_length"] = int(original)
    if kind == "yarn":
        for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            pairs[f"rope.scaling.yarn_{key}"] = float(main.get(key) or default)
        if main.get("attention_factor") is not None or main.get("mscale"):
            raise refuse(model, "GGUF has no place for its yarn attention_factor", PLAIN_MODEL)
    return pairs, {}


def _of_windows(model: PlainView, row: Row, main: dict[str, Any], own: dict[str, Any]) -> Pairs:
    """The rotary embedding of layers with a window: a base of its own, and no scaling."""
    if own.get("rope_type", "default") != "default":
        raise refuse(model, "the rotary embedding of its windows is scaled", PLAIN_MODEL)
    base = float(own["rope_theta"])
    if row.arch == "gemma3":
        return {"rope.freq_base_swa": base}
    if base != float(main["rope_theta"]):
        raise refuse(model, f"{row.arch} files have one rope_theta for all layers", PLAIN_MODEL)
    return {}


def _llama3(main: dict[str, Any], dim: int) -> Tensor:
    """What each frequency is divided by: 1 for short waves, `factor` for long, between a blend."""
    half = dim // 2
    waves = (
        2 * math.pi * float(main["rope_theta"]) ** (torch.arange(half, dtype=torch.float64) / half)
    )
    low, high = float(main["low_freq_factor"]), float(main["high_freq_factor"])
    original = float(main["original_max_position_embeddings"])
    blend = ((original / waves - low) / (high - low)).clamp(0, 1)
    stretched: Tensor = 1 / ((1 - blend) / float(main["factor"]) + blend)
    return stretched.float()


def _longrope(pairs: Pairs, main: dict[str, Any], shape: Shape) -> tuple[Pairs, dict[str, Tensor]]:
    original = int(main["original_max_position_embeddings"])
    stretch = shape.max_context / original
    factor = main.get("attention_factor")
    if factor is None:
        factor = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    pairs |= {
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": float(factor),
    }
    tables = {
        f"rope_factors_{kind}.weight": torch.tensor(main[f"{kind}_factor"], dtype=torch.float32)
        for kind in ("long", "short")
    }
    return pairs, tables
