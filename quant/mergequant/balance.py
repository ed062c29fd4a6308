"""Even out what `o_proj` and `down_proj` read before it is mixed: x_j / d_j against W_:j d_j.

On a few tokens one neuron is hundreds of times louder than all others, and a Hadamard matrix only
spreads it over every channel, where it takes the step. Each row that makes x_j, of `v_proj` or
`up_proj`, has a multiplier of its own, which can take the division up: nothing is added to what
runs. The weight's column gets larger instead, which the mixing spreads too and so costs little: the
energy sum_j E[x_j^2] / d_j^2 * sum_j |W_:j|^2 d_j^2 is least at

    d_j = (rms(x_j) / rms(W_:j)) ^ power,   power = 1/2

(the weighing of SmoothQuant, arXiv 2211.10438). Neurons that are loud on a few tokens only want a
higher power, quiet inputs a lower: the one with the least error on a sample is taken.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optim.quant.fold import family_groups, query_repeats
from optim.quant.mergequant.steps import choose_clip, one_step
from optim.runtime.decoder.linears.static_int import StepLinear
from optim.runtime.formats.hadamard import Mixing
from optim.runtime.formats.static_int import Exact, StaticSite, TokenSite

POWERS = (0.25, 0.5, 0.75)
TRIAL_TOKENS = 1024  # of the sample, that powers are compared on
LEAST = 1e-4  # of the mean square, below which a channel counts as no quieter


@dataclass(frozen=True, slots=True)
class Feeder:
    """The linear whose last rows make an input; `repeats` (query heads a value head, its size)."""

    name: str
    repeats: tuple[int, int] | None

    def shared(self, t: Tensor) -> Tensor:
        """`t` `[n]` with one mean for all channels that one row makes."""
        if self.repeats is None:
            return t
        return t.view(-1, *self.repeats).mean(1, keepdim=True).expand(-1, *self.repeats).flatten()

    def rows(self, d: Tensor) -> Tensor:
        """The entry of `d` `[n]` for each row."""
        return d if self.repeats is None else d.view(-1, *self.repeats)[:, 0].flatten()


def feeder(block: nn.Module, reader: str, model_type: str) -> Feeder | None:
    """Who makes what `reader` reads, linearly and for it alone; None where the table knows none."""
    for group in family_groups(block, model_type)[0]:
        if group.readers == (reader,):
            return Feeder(group.source, query_repeats(block, group))
    return None


def divisors(loud: Tensor, weight: Tensor, source: Feeder, power: float) -> Tensor:
    """d `[n]` from the channels' mean squares `loud` `[n]` and their reader's weight `[out, n]`."""
    loud, heavy = (source.shared(t) for t in (loud, weight.square().mean(0)))
    loud, heavy = (t.clamp(min=max(LEAST * float(t.mean()), 1e-20)) for t in (loud, heavy))
    d = (loud / heavy) ** (power / 2)
    return d / d.log().mean().exp()


def choose_divisors(
    x: Tensor, loud: Tensor, weight: Tensor, source: Feeder, kind: str, bits: int, mix: Mixing
) -> Tensor:
    """d `[n]` of the power with the least error on a sample `[tokens, n]` of the input.

    Errors are those of the input's codes and, by their expected size, of the weight's.
    """
    x = x[:: len(x) // TRIAL_TOKENS + 1]

    def error(d: Tensor) -> float:
        mixed, turned = mix(x / d), mix(weight * d)
        rounded = ((_rounded(mixed, kind, bits) - mixed) @ turned.T).square().sum()
        unit = turned.abs().amax(1) / 7
        return float(rounded + mixed.square().sum() * unit.square().sum() / 24)

    return min((divisors(loud, weight, source, power) for power in POWERS), key=error)


def _rounded(mixed: Tensor, kind: str, bits: int) -> Tensor:
    """What the codes stand for; one static step for all channels, as they are much alike."""
    if kind == "token":
        codes, step = TokenSite(choose_clip(mixed, bits), bits, None).forward(mixed)
        return codes * step
    steps = one_step(mixed, bits).step
    return StaticSite({"gain": 1 / steps}, bits, None, Exact()).forward(mixed)[0] * steps


def divide_rows(linear: StepLinear, by: Tensor) -> None:
    """Divide the last rows that `linear` makes, for which its multipliers suffice."""
    ones = torch.ones(linear.out_features - len(by), device=by.device)
    by = torch.cat((ones, by))
    linear.scale = linear.scale / by
    if linear.bias is not None:
        linear.bias = linear.bias / by
