"""Rows divided so that what o_proj and down_proj read is even: exact, and less is lost."""

import torch
from torch import Tensor

from optim.quant import gptq
from optim.quant.grid import restore
from optim.quant.mergequant import balance
from optim.quant.mergequant.balance import Feeder, choose_divisors, divide_rows, divisors
from optim.quant.mergequant.sites import _add_share
from optim.quant.mergequant.steps import clipped_grid, one_step
from optim.runtime.decoder.linears.static_int import StepLinear
from optim.runtime.formats.hadamard import mixing
from optim.runtime.formats.static_int import pack_nibbles

ALONE = Feeder("up", None)


def _inputs() -> tuple[Tensor, Tensor]:
    """Inputs `[2000, 96]` with one neuron that is 300 times louder on two percent of tokens."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 96, generator=generator) * 0.1
    x[::50, 7] = 30 + torch.randn(40, generator=generator)
    return x, torch.randn(48, 96, generator=generator)


def _lost(x: Tensor, weight: Tensor) -> float:
    mix = mixing(96)
    x, weight = mix(x), mix(weight)
    step = one_step(x, 4).step
    quiet = torch.ones(len(x), dtype=torch.bool)
    quiet[::50] = False
    error = ((x / step).round().clamp(-8, 7) * step - x) @ weight.T
    return float(error[quiet].square().mean() / (x @ weight.T)[quiet].square().mean())


def test_a_loud_neuron_no_longer_takes_the_step() -> None:
    x, weight = _inputs()
    loud = x.square().mean(0)
    d = choose_divisors(x, loud, weight, ALONE, "channel", 4, mixing(96))
    assert d.argmax() == 7 and d[7] > 5 * d.median()
    assert torch.allclose((x / d) @ (weight * d).T, x @ weight.T, atol=1e-3)
    assert _lost(x, weight) > 0.5 > 5 * _lost(x / d, weight * d)


def test_channels_that_one_row_makes_share_a_divisor() -> None:
    x, weight = _inputs()
    source = Feeder("v", (3, 8))  # four value heads of 8, read by 12 query heads
    d = divisors(x.square().mean(0), weight, source, 0.5)
    heads = d.view(4, 3, 8)
    assert torch.equal(heads, heads[:, :1].expand_as(heads))
    assert torch.equal(source.rows(d), heads[:, 0].flatten())


def test_dead_channels_get_finite_divisors() -> None:
    x, weight = _inputs()
    x[:, 3], weight[:, 4] = 0, 0
    for power in balance.POWERS:
        d = divisors(x.square().mean(0), weight, ALONE, power)
        assert bool(d.isfinite().all()) and float(d.min()) > 0
    assert bool(divisors(torch.zeros(96), weight, ALONE, 0.5).isfinite().all())


def test_rows_are_divided_by_their_multipliers_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    packed = pack_nibbles(torch.randint(0, 16, (10, 8), generator=generator).to(torch.uint8))
    bias, by = torch.randn(10, generator=generator), torch.rand(6, generator=generator) + 0.5
    codes = torch.randint(-8, 8, (5, 8), generator=generator).float()
    linear = StepLinear(packed, torch.rand(10, generator=generator), bias, 4, None)
    before = linear(codes)
    divide_rows(linear, by)
    after = linear(codes)
    assert torch.equal(after[:, :4], before[:, :4])  # q and k of a fused projection
    assert torch.allclose(after[:, 4:], before[:, 4:] / by)


def test_the_prefix_keeps_its_product_in_few_bits() -> None:
    """A row with a share of the Gram matrix is answered more exactly, the rest little worse."""
    generator = torch.Generator().manual_seed(2)
    x, row = (torch.randn(n, 64, generator=generator) for n in (1000, 1))
    weight = torch.randn(32, 64, generator=generator)
    gram = x.T @ x / 1000
    grid = clipped_grid(weight, gram.diagonal())

    def errors(gram: Tensor) -> tuple[float, float]:
        q = gptq.round_with_feedback(weight, grid, gptq.feedback(gram.clone(), 0.01))
        off = restore(q, grid) - weight
        return tuple(float((y @ off.T).norm() / (y @ weight.T).norm()) for y in (row * 50, x))

    before = errors(gram)
    trace = gram.trace()
    _add_share(gram, row * 50)
    after = errors(gram)
    assert torch.allclose(gram.trace(), trace * 17 / 16)
    assert after[0] < 0.6 * before[0] and after[1] < 1.1 * before[1]
