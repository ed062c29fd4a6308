"""The integer grid: what it covers, what rounds to what, and that the stored form says the same."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optim.quant.grid import grouped, make_grid, nearest, ranges, restore, round_to, spread
from optim.runtime.formats.pack_quantized import Scheme, dequantize, pack, unpack

SCHEMES = st.builds(
    Scheme, st.sampled_from([2, 3, 4, 8]), st.sampled_from([-1, 16, 32]), st.booleans()
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def _weight(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 64, generator=generator)
    return weight * torch.rand(rows, 1, generator=generator) + torch.randn(1, generator=generator)


@given(SCHEMES, st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**31))
def test_no_weight_moves_far(scheme: Scheme, dtype: torch.dtype, seed: int) -> None:
    """Half a step, half more at the ends where the zero point was rounded, and the scale's own."""
    weight = _weight(5, seed)
    q, grid = nearest(weight, scheme, dtype)
    assert q.min() >= 0 and q.max() <= grid.top and torch.equal(q, q.round())
    steps = (restore(q, grid) - weight).abs() / spread(grid.scale, 64)
    assert steps.max() <= 1.001 + grid.top * torch.finfo(dtype).eps / 2


@given(SCHEMES, DTYPES, st.integers(0, 2**31))
def test_what_is_solved_is_what_is_stored(scheme: Scheme, dtype: torch.dtype, seed: int) -> None:
    weight = _weight(8, seed)
    q, grid = nearest(weight, scheme, dtype)
    zero = None if scheme.symmetric else grid.zero.to(torch.uint8)
    stored = pack(q.to(torch.uint8), grid.scale.to(dtype), zero, scheme)
    assert torch.equal(dequantize(*unpack(stored, scheme), scheme), restore(q, grid))


@given(SCHEMES, st.integers(0, 2**31))
def test_rounding_twice_changes_nothing(scheme: Scheme, seed: int) -> None:
    q, grid = nearest(_weight(4, seed), scheme, torch.float32)
    assert torch.equal(round_to(restore(q, grid), grid), q)


def test_by_hand() -> None:
    weight = torch.tensor([[-1.0, 0.2, 0.9, 2.0]])
    q, grid = nearest(weight, Scheme(2, -1, False), torch.float32)
    assert (grid.scale.tolist(), grid.zero.tolist()) == ([[1.0]], [[1.0]])
    assert q.tolist() == [[0, 1, 2, 3]]
    q, grid = nearest(weight, Scheme(2, -1, True), torch.float32)
    assert grid.zero.tolist() == [[2.0]] and abs(grid.scale.item() - 4 / 3) < 1e-6
    assert q.tolist() == [[1, 2, 3, 3]]


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zero(symmetric: bool) -> None:
    weight = torch.zeros(2, 32)
    weight[0, 16:] = torch.linspace(0.5, 2, 16)  # a group all of one sign covers zero too
    q, grid = nearest(weight, Scheme(4, 16, symmetric), torch.bfloat16)
    assert grid.scale.isfinite().all() and (grid.scale > 0).all()
    got = restore(q, grid)
    assert torch.equal(got[1], torch.zeros(32)) and torch.equal(got[0, :16], torch.zeros(16))
    low, high = ranges(weight, Scheme(4, 16, symmetric))
    assert low[0, 1] == 0 and high[0, 1] == 2


def test_a_scale_below_the_type_does_not_vanish() -> None:
    q, grid = nearest(torch.full((1, 16), 1e-9), Scheme(4, -1, False), torch.float16)
    assert (grid.scale > 0).all() and restore(q, grid).isfinite().all()


def test_groups_follow_the_input() -> None:
    weight = torch.arange(12.0).view(2, 6)
    assert grouped(weight, Scheme(4, 3, True)).tolist() == [
        [[0, 1, 2], [3, 4, 5]],
        [[6, 7, 8], [9, 10, 11]],
    ]
    assert spread(torch.tensor([[1, 2]]), 6).tolist() == [[1, 1, 1, 2, 2, 2]]
    scale = make_grid(
        torch.zeros(2, 2), torch.ones(2, 2), Scheme(4, 3, False), torch.bfloat16
    ).scale
    assert torch.equal(scale, torch.full((2, 2), 1 / 15).bfloat16().float())
