"""Rotary position embedding (RoFormer, arXiv 2104.09864): angles for positions, and the rotation.

A head's first `r` channels are pairs (i, i + r/2), turned by position * theta^(-2i/r). Scaled
kinds (llama3, yarn, longrope, dynamic, linear) take their frequencies from transformers, which is
imported only then.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optim.runtime.architecture.shape import DEFAULTS

Frequencies = tuple[Tensor, float]


@dataclass(slots=True)
class Rope:
    """Angles of one kind of layer. `scaled(end)` gives frequencies that depend on the length."""

    frequencies: Frequencies
    scaled: Callable[[int], Frequencies] | None = None

    def to(self, device: torch.device) -> "Rope":
        """The same, its frequencies on `device`."""
        inverse, factor = self.frequencies
        return Rope((inverse.to(device), factor), self.scaled)

    def angles(self, positions: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """cos and signed sin `[B, T, 1, r]` (fp32) for `positions` `[B, T]` of a text of `end`."""
        inverse, factor = self._at(end)
        cos, sin = _waves(positions[..., None, None], inverse)
        return cos * factor, sin * factor

    def turn(self, keys: Tensor, by: int, end: int) -> Tensor:
        """`keys` `[..., D]`, already rotated for their positions, moved on `by` positions."""
        inverse, _ = self._at(end)
        return rotate(keys, *_waves(torch.tensor([by], device=keys.device), inverse))

    def _at(self, end: int) -> Frequencies:
        return self.scaled(end) if self.scaled else self.frequencies


def _waves(positions: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """cos and signed sin; in fp64, as a stream's positions have no end."""
    turns = positions.double() * inverse.to(positions.device)
    cos, sin = turns.cos().float(), turns.sin().float()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` `[B, T, heads, D]` by `angles`; channels past r pass through."""
    r = cos.shape[-1]
    part = x if r == x.shape[-1] else x[..., :r]
    turned = torch.addcmul(part * cos, part.roll(r // 2, -1), sin).to(x.dtype)
    return turned if part is x else torch.cat((turned, x[..., r:]), -1)


def ropes(
    config: dict[str, Any],
    defaults: dict[str, Any],
    head_dim: int,
    hf_config: Callable[[], Any],
) -> dict[str, Rope]:
    """A model's rotary kinds: "full_attention", and "sliding_attention" where that differs."""
    c = DEFAULTS | defaults | {k: v for k, v in config.items() if v is not None}
    parameters = _by_kind(c)
    return {kind: _rope(p, kind, parameters, head_dim, hf_config) for kind, p in parameters.items()}


def _by_kind(c: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Both spellings of rope settings, as one dict a layer type."""
    theta = c.get("rotary_emb_base", c["rope_theta"])
    base = {
        "rope_theta": theta,
        "partial_rotary_factor": c.get("rotary_pct", c["partial_rotary_factor"]),
    }
    given = c.get("rope_scaling") or c.get("rope_parameters") or {}
    if "full_attention" in given or "sliding_attention" in given:
        return {kind: base | p for kind, p in given.items() if p}
    kinds = {"full_attention": base | given}
    if "rope_local_base_freq" in c:
        kinds["sliding_attention"] = base | {"rope_theta": c["rope_local_base_freq"]}
    return kinds


def _rope(
    p: dict[str, Any],
    kind: str,
    kinds: dict[str, dict[str, Any]],
    head_dim: int,
    hf_config: Callable[[], Any],
) -> Rope:
    style = p.get("rope_type", p.get("type", "default"))
    if style == "default":
        r = int(head_dim * p["partial_rotary_factor"])
        return Rope((p["rope_theta"] ** -(torch.arange(0, r, 2, dtype=torch.float) / r), 1.0))
    return _scaled(hf_config(), kind if len(kinds) > 1 else None)


def _scaled(config: Any, layer_type: str | None) -> Rope:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    p = config.rope_parameters
    if layer_type and layer_type in p:
        p = p[layer_type]
    else:
        layer_type = None
    compute = ROPE_INIT_FUNCTIONS[p["rope_type"]]
    short: Frequencies = compute(config, torch.device("cpu"), layer_type=layer_type)
    limit = p.get("original_max_position_embeddings") or config.max_position_embeddings

    def at_length(end: int) -> Frequencies:
        if end <= limit:
            return short
        longer, _ = compute(config, torch.device("cpu"), seq_len=end, layer_type=layer_type)
        return longer, short[1]

    return Rope(short, at_length if p["rope_type"] in ("dynamic", "longrope") else None)
