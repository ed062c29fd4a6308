"""Static steps for one input, and the weights that hold them (Quantization Step Migration).

With steps s and centres c the input becomes codes q = clamp(floor((x - c) / s + 1/2)) (what the
norm emits, its gain divided by s) and the linear reads W' = W diag(s) with one multiplier a row,
plus the constant W c: y = W' q + W c. Steps come from the calibration text, channel by channel.

    ratio r in (0, 1]:  s = r max|x - c| / 7,  the r with the least sum (x - c - s q)^2

Every token counts alike. Weighing each by 1 / mean(x_t^2) was tried: it clips the few tokens that a
`down_proj` answers most strongly, and one block's error rose from 9 to 61 percent.

Without a rotation a few channels have steps far above the others and would spoil the range of every
row of W'. They are split: k copies with weight step s / k and rounding offsets (m + 1/2) / k, whose
sum, by Hermite's identity sum_m floor(z + m/k) = floor(k z), is the input rounded k times finer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from optim.quant.grid import Grid
from optim.runtime.formats.pack_quantized import Scheme
from optim.runtime.formats.static_int import limits

RATIOS = tuple(0.88**i for i in range(26))  # 1.0 down to 0.04
WEIGHT_RATIOS = tuple(1 - 0.025 * i for i in range(25))  # 1.0 down to 0.4
SPLIT_AT = 2.5  # standard deviations of the steps above their mean
WEIGHT_SCHEME = Scheme(4, -1, True)


@dataclass(frozen=True, slots=True)
class Steps:
    """Steps and centres `[n]` of a site; `step` is also what the codes' columns are worth."""

    step: Tensor
    center: Tensor | None


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns a linear reads: `index` `[K]` into the channels, their worth and dither `[K]`."""

    index: Tensor
    worth: Tensor
    dither: Tensor


def choose_steps(x: Tensor, bits: int, centred: bool) -> Steps:
    """Steps of a sample `[tokens, n]` of an input, each channel clipped for the least error."""
    center = x.mean(0) if centred else torch.zeros_like(x[0])
    return Steps(_search(x - center, bits), center if centred else None)


def one_step(x: Tensor, bits: int) -> Steps:
    """One step for all channels of a sample `[tokens, n]`, clipped for the least error."""
    return Steps(_search(x.reshape(-1, 1), bits).expand(x.shape[1]).contiguous(), None)


def _search(x: Tensor, bits: int) -> Tensor:
    """The step of each column of `x` with the least squared error."""
    low, high = limits(bits)
    top = torch.maximum(x.amax(0) / high, x.amin(0) / low).clamp(min=0)
    top = torch.where(top > 1e-12, top, torch.ones_like(top))
    best, found = torch.full_like(top, torch.inf), top
    for ratio in RATIOS:
        step = top * ratio
        codes = (x / step + 0.5).floor_().clamp_(low, high)
        error = codes.mul_(step).sub_(x).square_().sum(0)
        found = torch.where(error < best, step, found)
        best = torch.minimum(error, best)
    return found


def split(step: Tensor) -> Columns:
    """The channels with large steps `[n]` in copies; the others as they are."""
    limit = step.mean() + SPLIT_AT * step.std()
    copies = (step / limit).ceil().clamp(min=1).long()
    index = torch.arange(len(step), device=step.device).repeat_interleave(copies)
    first = copies.cumsum(0) - copies
    place = torch.arange(len(index), device=step.device) - first[index]
    many = copies[index].float()
    return Columns(index, step[index] / many, (place + 0.5) / many)


def site_parts(steps: Steps, columns: Columns | None) -> dict[str, Tensor]:
    """The stored tensors of a static site."""
    if columns is None:
        parts = {"gain": 1 / steps.step}
        if steps.center is not None:
            parts["shift"] = steps.center / steps.step
        return parts
    assert steps.center is None
    index = columns.index
    return {"gain": 1 / steps.step[index], "dither": columns.dither, "index": index.int()}


def clipped_grid(weight: Tensor, energy: Tensor) -> Grid:
    """A symmetric 4-bit grid a row of `[out, K]`, its range shrunk for the least weighted error.

    `energy` `[K]` is the mean square of each code.
    """
    top = weight.abs().amax(1, keepdim=True) / 7
    top = torch.where(top > 0, top, torch.ones_like(top))
    best, found = torch.full_like(top, torch.inf), top
    for ratio in WEIGHT_RATIOS:
        scale = top * ratio
        error = (weight / scale).round_().clamp_(-8, 7).mul_(scale).sub_(weight).square_() @ energy
        found = torch.where(error[:, None] < best, scale, found)
        best = torch.minimum(error[:, None], best)
    return Grid(found, torch.full_like(found, 8), WEIGHT_SCHEME)


def choose_clip(x: Tensor, bits: int) -> float:
    """The share of each token's range that a step found at run time should cover."""
    low, high = limits(bits)
    peak = x.abs().amax(1, keepdim=True).clamp(min=1e-20)

    def error(clip: float) -> float:
        step = peak * (clip / high)
        return float(((x / step + 0.5).floor_().clamp_(low, high) * step - x).square_().sum())

    return min((1 - 0.03 * i for i in range(20)), key=error)
