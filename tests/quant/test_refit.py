"""Refitted scales: never a larger output error, and the exact answer where there is one."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optim.quant.grid import Grid, nearest, restore
from optim.quant.refit import refit_scales
from optim.runtime.formats.pack_quantized import Scheme


def _error(weight: Tensor, q: Tensor, grid: Grid, gram: Tensor) -> Tensor:
    e = (weight - restore(q, grid)).double()
    return ((e @ gram.double()) * e).sum(-1)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([-1, 16, 32]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 200),
    st.integers(0, 2**31),
)
def test_never_worse(
    bits: int, size: int, symmetric: bool, dtype: torch.dtype, tokens: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 64, generator=generator)
    x = torch.randn(tokens, 64, generator=generator) + torch.randn(64, generator=generator)
    gram = x.T @ x / tokens
    q, grid = nearest(weight, Scheme(bits, size, symmetric), dtype)
    new = refit_scales(weight, q, grid, gram, dtype)
    before, after = _error(weight, q, grid, gram), _error(weight, q, new, gram)
    energy = ((weight @ gram) * weight).sum(-1)
    assert bool((after <= before + 1e-5 * energy).all())  # up to float32's own rounding
    assert bool((new.scale > 0).all()) and torch.equal(new.scale, new.scale.to(dtype).float())
    assert torch.equal(new.zero, grid.zero)


def test_it_helps_and_finds_scales_that_were_lost() -> None:
    generator = torch.Generator().manual_seed(0)
    scheme, x = Scheme(4, 16, False), torch.randn(300, 64, generator=generator)
    gram = x.T @ x / 300
    q, grid = nearest(torch.randn(6, 64, generator=generator), scheme, torch.float32)
    weight = restore(q, grid)
    lost = Grid(grid.scale * 1.2, grid.zero, scheme)
    found = refit_scales(weight, q, lost, gram, torch.float32)
    assert torch.allclose(found.scale, grid.scale, rtol=1e-3)
    noisy = torch.randn(6, 64, generator=generator)
    q, grid = nearest(noisy, Scheme(2, 16, False), torch.float32)
    new = refit_scales(noisy, q, grid, gram, torch.float32)
    assert _error(noisy, q, new, gram).sum() < 0.95 * _error(noisy, q, grid, gram).sum()


def test_dead_inputs_keep_their_scales() -> None:
    weight = torch.randn(4, 32)
    q, grid = nearest(weight, Scheme(4, 16, True), torch.float32)
    new = refit_scales(weight, q, grid, torch.zeros(32, 32), torch.float32)
    assert torch.equal(new.scale, grid.scale)
