"""The largest outputs of a head by way of 8 bits: in every bit those of all rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optim.runtime.kernels.bf12 import planes_of
from optim.runtime.kernels.cpu import bf16, shortlist
from optim.runtime.kernels.cpu.dense import Dense
from optim.runtime.kernels.cpu.shortlist import Shortlist


@pytest.fixture(scope="module", autouse=True)
def kernel(isa: str) -> None:
    if not shortlist.usable():
        pytest.skip("no C compiler here")


def made(weight: Tensor, in_planes: bool) -> Shortlist:
    return Shortlist(Dense(planes_of(weight).c if in_planes else weight, None))


def agrees(head: Shortlist, weight: Tensor, x: Tensor, best: int) -> Tensor:
    """The same ids and bits as from all rows, ties included; the outputs."""
    got, wanted = head(x, best), bf16.linear(x, weight)
    least = wanted.topk(min(best, len(weight))).values[:, -1:]
    needed = wanted >= least
    torch.testing.assert_close(got[needed], wanted[needed], rtol=0, atol=0, equal_nan=True)
    read = got != -torch.inf
    assert torch.equal(got[read], wanted[read])
    return got


@given(
    st.integers(1, 3),
    st.integers(1, 300),
    st.integers(1, 200),
    st.integers(1, 60),
    st.floats(-30, 30),
    st.booleans(),
    st.integers(0, 1 << 30),
)
@settings(max_examples=80, deadline=None, database=None)
def test_the_largest_are_those_of_all_rows(
    tokens: int, outputs: int, inputs: int, best: int, power: float, planes: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    weight *= torch.rand(outputs, 1, generator=generator) * 2.0**power
    weight[torch.randint(outputs, (outputs // 3,), generator=generator)] = weight[0].clone()  # ties
    weight[:, torch.randint(inputs, (1,), generator=generator)] *= 30  # a large input
    weight = weight.to(torch.bfloat16)
    x = torch.randn(tokens, inputs, generator=generator) * 2.0 ** (power / 2)
    agrees(made(weight, planes), weight, x, best)


@pytest.mark.parametrize("value", [0.0, 1e-42, 3e38, torch.inf, torch.nan])
@pytest.mark.parametrize("in_weight", [False, True])
def test_numbers_at_the_ends(value: float, in_weight: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 70, generator=generator).to(torch.bfloat16)
    x = torch.randn(1, 70, generator=generator)
    if in_weight:
        weight[3] = value
        weight[7, 5] = value
    else:
        x[0, 5] = value
    got, wanted = made(weight, False)(x, 4), bf16.linear(x, weight)
    if wanted.isnan().any():
        assert got.isnan().any() or not got.max().isfinite()
    else:
        agrees(made(weight, False), weight, x, 4)


def test_few_rows_are_read() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20000, 576, generator=generator).to(torch.bfloat16)
    x = 3 * weight[77].float() + torch.randn(576, generator=generator)
    head = made(weight, False)
    assert int(agrees(head, weight, x[None], 1).argmax()) == 77
    assert head.rows_read == 1
    assert head.nbytes < 0.53 * weight.nbytes
