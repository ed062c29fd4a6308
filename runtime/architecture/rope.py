"""Rotary position embedding (RoFormer, arXiv 2104.09864): angles for positions, and the rotation.

A head's first `r` channels are pairs (i, i + r/2), turned by position * theta^(-2i/r). Scaled
kinds (llama3, yarn, longrope, dynamic, linear) take their frequencies from transformers, which is
imported only then.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.architecture.table import Decoder

Frequencies = tuple[Tensor, float]


@dataclass(slots=True)
class Rope:
    """Angles of one kind of layer. `scaled(end)` gives frequencies that depend on the length.

    A text longer than `crossing` has other angles from its first token on.
    """

    frequencies: Frequencies
    scaled: Callable[[int], Frequencies] | None = None
    crossing: int | None = None

    def to(self, device: torch.device) -> "Rope":
        """The same, its frequencies on `device`."""
        inverse, factor = self.frequencies
        return Rope((inverse.to(device), factor), self.scaled, self.crossing)

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


def ropes(config: Any, facts: Decoder, head_dim: int) -> dict[str, Rope]:
    """A model's rotary kinds: "full_attention", and "sliding_attention" where that differs.

    None where positions are learned. `config` is transformers' object. Raises OptimError (2) for
    parameters that give no angles.
    """
    if facts.positions:
        return {}
    parameters = config.rope_parameters
    share = "partial_rotary_factor" if facts.partial_rotary else ""
    kinds = config.nested_rope_parameter_keys(parameters)
    if not kinds:
        return {"full_attention": _rope(config, parameters, head_dim, share, None)}
    return {kind: _rope(config, parameters[kind], head_dim, share, kind) for kind in kinds}


def _rope(config: Any, p: dict[str, Any], head_dim: int, share: str, kind: str | None) -> Rope:
    def frequencies(end: int | None = None) -> Frequencies:
        """Those of transformers for a text of `end` tokens, checked."""
        try:
            if style == "default":
                r = int(head_dim * p.get(share, 1.0))
                found = p["rope_theta"] ** -(torch.arange(0, r, 2, dtype=torch.float) / r), 1.0
            else:
                from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

                compute = ROPE_INIT_FUNCTIONS[style]
                found = compute(config, torch.device("cpu"), seq_len=end, layer_type=kind)
        except Exception as error:  # a formula raises nearly anything on wrong parameters
            raise _no_angles(p, f"{type(error).__name__}: {error}") from None
        inverse, factor = found
        fits = inverse.dim() == 1 and 0 < 2 * inverse.numel() <= head_dim
        if not fits or not bool(inverse.isfinite().all()) or not math.isfinite(factor):
            raise _no_angles(p, f"{inverse.numel()} angles for heads of {head_dim}")
        return inverse, float(factor)

    if not isinstance(p, dict):
        raise _no_angles({}, "they are no dictionary")
    style = p.get("rope_type", "default")
    short = frequencies()
    if style not in ("dynamic", "longrope"):
        return Rope(short)
    limit = config.max_position_embeddings
    if style == "longrope":
        limit = p.get("original_max_position_embeddings") or limit
    if type(limit) is not int or limit < 1:
        raise _no_angles(p, f"original_max_position_embeddings is {limit!r:.60}")
    frequencies(limit + 1)

    def at_length(end: int) -> Frequencies:
        return short if end <= limit else (frequencies(end)[0], short[1])

    return Rope(short, at_length, limit if style == "longrope" else None)


def _no_angles(p: dict[str, Any], why: str) -> OptimError:
    style, fix = p.get("rope_type"), "check the file against the one the model was published with"
    return OptimError(f"config.json: rope parameters ({style!r:.60}): {why:.200}", fix, USAGE)
