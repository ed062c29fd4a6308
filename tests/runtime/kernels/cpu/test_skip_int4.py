"""4-bit columns that are left out, and gathered ones: against the dense kernel's reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optim.runtime.decoder.linears.gathered import gather_columns, gather_rows
from optim.runtime.formats.schemes import Scheme
from optim.runtime.kernels.cpu import skip_int4, w4a8

pytestmark = [
    pytest.mark.skipif(not skip_int4.usable(), reason="no C compiler"),
    pytest.mark.usefixtures("isa"),
]


def close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    scale = max(float(wanted.abs().max()), 1.0)  # sums may cancel
    assert float((got - wanted).abs().max()) <= tolerance * scale


def integers(
    outputs: int, inputs: int, scheme: Scheme, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 1 << scheme.bits, (outputs, inputs), generator=generator).to(torch.uint8)
    groups = scheme.groups(inputs)
    scale = (torch.rand(outputs, groups, generator=generator) + 0.1).bfloat16()
    zero = torch.randint(0, 1 << scheme.bits, scale.shape, generator=generator).to(torch.uint8)
    return q, scale, None if scheme.symmetric else zero


@settings(max_examples=80, deadline=None)
@given(
    st.tuples(st.integers(1, 300), st.integers(1, 5), st.integers(0, 9)),
    st.sampled_from([2, 3, 4]),
    st.sampled_from([16, 32, 64, 128, -1]),
    st.booleans(),
    st.sampled_from([1, 2, 64]),
    st.floats(0, 2),
    st.floats(-3, 3),
)
def test_what_is_left_out_counts_as_zero(
    shape: tuple[int, int, int],
    bits: int,
    group: int,
    symmetric: bool,
    lines: int,
    threshold: float,
    shift: float,
) -> None:
    outputs, groups, seed = shape
    inputs = 37 * groups if group == -1 else group * groups
    scheme = Scheme(bits, group, symmetric)
    parts = integers(outputs, inputs, scheme, seed)
    generator = torch.Generator().manual_seed(seed)
    x, bias = torch.randn(inputs, generator=generator) + shift, torch.randn(outputs)
    columns = skip_int4.packed(*parts, scheme, bias, lines)
    kept = torch.where(x.abs() > threshold, x, 0)
    close(columns(x, threshold), w4a8.reference(kept[None], *parts, scheme)[0] + bias)
    assert (columns.used, columns.calls) == (int((kept != 0).sum()), 1)
    q, scale, zero = parts
    exact = (columns.wide(slice(0, inputs)).T - dequantized(q, scale, zero, scheme)).abs()
    assert not exact.any()


def dequantized(
    q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    middle = torch.full_like(scale, 2 ** (scheme.bits - 1)) if zero is None else zero
    whole = (
        q.float().view(len(q), scale.shape[1], -1) - middle.float()[..., None]
    ) * scale.float()[..., None]
    return whole.view_as(q)


def test_activations_of_one_sign_and_of_none() -> None:
    scheme = Scheme(4, 64, True)
    parts = integers(200, 128, scheme, 1)
    columns = skip_int4.packed(*parts, scheme, None)
    for value in (2.0, -2.0, 0.0):
        x = torch.full((128,), value)
        close(columns(x), w4a8.reference(x[None], *parts, scheme)[0])
    assert not columns(torch.zeros(128), 0.0).any() and columns.used == 0
    three = torch.randn(3, 128)
    assert torch.equal(columns(three), torch.stack([columns(row) for row in three]))
    assert columns(torch.full((128,), float("nan")), 0.5).isnan().all()


def test_threads_change_nothing() -> None:
    scheme = Scheme(4, 64, False)
    columns = skip_int4.packed(*integers(9000, 128, scheme, 1), scheme, None)
    x, threads = (
        torch.randn(128, generator=torch.Generator().manual_seed(1)),
        torch.get_num_threads(),
    )
    one = columns(x, 0.5)
    try:
        torch.set_num_threads(2)
        assert torch.equal(columns(x, 0.5), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gathered_int4_is_unpack_and_gather(symmetric: bool) -> None:
    scheme = Scheme(4, 32, symmetric)
    parts = integers(83, 192, scheme, 4)
    keep = torch.randperm(192, generator=torch.Generator().manual_seed(1))[:70].sort().values
    columns = skip_int4.packed(*parts, scheme, None)
    bias = torch.randn(83, generator=torch.Generator().manual_seed(7))
    small = gather_columns(columns, keep, bias)
    assert torch.equal(small.wide(slice(0, 70)), columns.wide(slice(0, 192))[keep])
    x = torch.randn(70, generator=torch.Generator().manual_seed(2))
    close(small(x), x @ small.wide(slice(0, 70)) + bias, 0.02)
    rows = torch.tensor([3, 8, 9, 40, 82])
    weight = w4a8.Weight(*parts, scheme, torch.arange(83.0))
    y = torch.randn(2, 192, generator=torch.Generator().manual_seed(3))
    assert torch.equal(gather_rows(weight, rows)(y), weight(y)[:, rows])
