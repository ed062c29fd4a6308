"""Static integer linears: 4-bit weights, activations whose quantization step is part of the model.

A *site* is one input: the output of a norm, or what `o_proj` or `down_proj` reads. Its codes are

    code_k = clamp(floor(x[index_k] * gain_k + (dither_k - shift_k)))        to bits: -8 .. 7

with gain = 1 / step (times the norm's own weight), shift = mean / step, dither 1/2; all known
before the model runs. Its readers hold the steps in their weights and need one multiplier a row:

    y_i = scale_i * sum_k (u_ik - 8) code_k + bias_i = scale_i * (sum_k u_ik code_k - 8 R) + bias_i

with unsigned nibbles u and R = sum_k code_k, all of it in integers, nothing per token. The
other kind of site, `token`, takes its step from each token: step = clip * max|x| / 7.

Stored, per linear:                             per site (of a norm under the norm's name, else
    weight_packed  uint8 [out, ceil(K/2)]       under the linear's with `input_` before it):
    weight_scale   float32 [out]                    gain, shift  float32 [K]
    bias           float32 [out], if any            dither float32 [K], index int32 [K]: split ones
                                                    clip float32 [1]: a `token` site has this alone

Byte b of a row has column b in its low and column b + ceil(K/2) in its high nibble: two runs of
activations, each contiguous, meet the two halves of a run of bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.formats.hadamard import Mixing, mixing, random_signs

STREAM_SEED = 0
METHOD = "optim-static"  # quant_method of the configuration
SITE_PARTS = ("gain", "shift", "dither", "index")
INPUT_PARTS = (*(f"input_{part}" for part in SITE_PARTS), "input_clip")
LINEAR_PARTS = ("weight_packed", "weight_scale", *INPUT_PARTS)
TILE = 1 << 21  # weights unpacked at a time
EXACT_SUM = 1 << 24  # up to here float32 adds integers without rounding


@dataclass(slots=True)
class Exact:
    """How many leading positions are left unrounded: a prefix's, when its keys are computed."""

    positions: int = 0


@dataclass(frozen=True, slots=True)
class Static:
    """`quantization_config` of such an artifact, read and checked.

    `bits` and `kinds` ("static", "token") are those of the sites "norm", "out" and "down". `prefix`
    are the tokens whose keys and values every text begins with.
    """

    bits: Mapping[str, int]
    kinds: Mapping[str, str]
    rotated: bool
    prefix: tuple[int, ...] = ()

    def config(self) -> dict[str, Any]:
        """As config.json has it."""
        return {
            "quant_method": METHOD,
            "format_version": 1,
            "weight_bits": 4,
            "activation_bits": dict(self.bits),
            "activation_steps": dict(self.kinds),
            "rotated": self.rotated,
            "prefix": list(self.prefix),
        }


def read_config(config: Mapping[str, Any] | None) -> Static | None:
    """The static layout of a checkpoint's `quantization_config`; None where it has another.

    Raises OptimError (2) for one that this version cannot read.
    """
    if not config or config.get("quant_method") != METHOD:
        return None
    bits, kinds, prefix = (
        config.get(key) for key in ("activation_bits", "activation_steps", "prefix")
    )
    known = (
        config.get("format_version") == 1
        and config.get("weight_bits") == 4
        and isinstance(bits, Mapping)
        and isinstance(kinds, Mapping)
        and all(type(value) is int and value in (4, 8) for value in bits.values())
        and all(value in ("static", "token") for value in kinds.values())
        and isinstance(prefix, list)
        and all(type(token) is int and token >= 0 for token in prefix)
        and set(bits) == set(kinds) == {"norm", "out", "down"}
    )
    if not known:
        fix = "make it again with this version of optim"
        raise OptimError("the static quantization_config is not one of version 1", fix, USAGE)
    assert isinstance(bits, Mapping) and isinstance(kinds, Mapping) and isinstance(prefix, list)
    return Static(dict(bits), dict(kinds), bool(config.get("rotated")), tuple(prefix))


def stream_rotation(width: int) -> Mixing:
    """The turn of the residual stream of `width` channels that every such artifact has."""
    return mixing(width, random_signs(width, STREAM_SEED))


def pack_nibbles(u: Tensor) -> Tensor:
    """uint8 `[out, K]` below 16 -> uint8 `[out, ceil(K/2)]`."""
    padded = F.pad(u, (0, u.shape[1] % 2))
    low, high = padded.chunk(2, 1)
    return low | high << 4


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.cat((packed & 15, packed >> 4), 1)[:, :columns]


def accumulate(codes: Tensor, u: Tensor) -> Tensor:
    """The reference in exact integers: int8 `[M, K]`, uint8 `[N, K]` -> int32 `[M, N]`."""
    products = codes.to(torch.int32) @ u.to(torch.int32).T
    return products - 8 * codes.to(torch.int32).sum(1, keepdim=True)


def limits(bits: int) -> tuple[int, int]:
    """The least and the largest code."""
    return -(1 << bits - 1), (1 << bits - 1) - 1


class StaticSite(nn.Module):
    """x `[..., n]` -> (codes `[..., K]` as floats, None)."""

    gain: Tensor
    shift: Tensor | None
    dither: Tensor | None
    index: Tensor | None
    offset: Tensor

    def __init__(
        self, parts: Mapping[str, Tensor], bits: int, mix: Mixing | None, exact: Exact
    ) -> None:
        """`parts` as stored; `mix` is applied to x first."""
        super().__init__()
        for key in SITE_PARTS:
            self.register_buffer(key, parts.get(key))
        self.bits, self.mix, self.exact = bits, mix, exact
        offset = torch.full_like(self.gain, 0.5) if self.dither is None else self.dither
        self.register_buffer("offset", offset if self.shift is None else offset - self.shift)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        x = x.float()
        if self.mix is not None:
            x = self.mix(x)
        if self.index is not None:
            x = x[..., self.index]
        z = x * self.gain
        codes = (z + self.offset).floor_().clamp_(*limits(self.bits))
        free = self.exact.positions
        if free and x.dim() == 3:
            kept = z[:, :free] if self.shift is None else z[:, :free] - self.shift
            codes[:, :free] = kept
        return codes, None


class TokenSite(nn.Module):
    """x `[..., K]` -> (codes, steps `[..., 1]`), the step taken from each token."""

    def __init__(self, clip: float, bits: int, mix: Mixing | None) -> None:
        super().__init__()
        self.clip, self.bits, self.mix = clip, bits, mix

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.float()
        if self.mix is not None:
            x = self.mix(x)
        low, high = limits(self.bits)
        step = (x.abs().amax(-1, keepdim=True) * (self.clip / high)).clamp(min=1e-20)
        return (x / step + 0.5).floor_().clamp_(low, high), step


Site = StaticSite | TokenSite


def plain_product(codes: Tensor, packed: Tensor, bits: int) -> Tensor:
    """Codes `[..., K]`, whole or not, nibbles `[N, K/2]` -> sums float32 `[..., N]`, in torch.

    Rows are unpacked a tile at a time. Sums of integers are exact in float32 up to 2^24; longer
    rows go in pieces that stay below.
    """
    columns = 2 * packed.shape[1]
    step, piece = max(64, TILE // columns), EXACT_SUM // (8 << bits - 1)
    out = codes.new_empty(*codes.shape[:-1], packed.shape[0])
    for start in range(0, packed.shape[0], step):
        rows = unpack_nibbles(packed[start : start + step], columns).float() - 8
        parts = zip(torch.split(codes, piece, -1), torch.split(rows, piece, 1), strict=True)
        out[..., start : start + step] = sum(c @ r.T for c, r in parts)
    return out


def check_linear(name: str, parts: Mapping[str, Tensor]) -> None:
    """Refuse (OptimError 2) stored tensors of a linear that do not belong together."""
    packed, scale = parts.get("weight_packed"), parts.get("weight_scale")
    good = (
        packed is not None
        and scale is not None
        and packed.dtype == torch.uint8
        and packed.dim() == 2
        and scale.dtype == torch.float32
        and scale.shape == packed.shape[:1]
        and bool(scale.isfinite().all())
    )
    if not good:
        fix = "is the artifact complete?"
        raise OptimError(f"{name} cannot be used: its nibbles and scales do not fit", fix, USAGE)
