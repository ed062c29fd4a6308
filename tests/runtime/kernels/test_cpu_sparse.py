"""Columns that are left out, rows that a gate leaves over: against torch, on odd shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optim.runtime.formats.schemes import Scheme
from optim.runtime.kernels import cpu_sparse, cpu_w4a8
from optim.runtime.kernels.gathered import gather_columns, gather_rows

pytestmark = pytest.mark.skipif(not cpu_sparse.usable(), reason="no C compiler")
SHAPES = st.tuples(st.integers(1, 200), st.integers(1, 300), st.integers(0, 9))


def close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    scale = max(float(wanted.abs().max()), 1.0)  # sums may cancel
    assert float((got - wanted).abs().max()) <= tolerance * scale


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.sampled_from([torch.float32, torch.bfloat16]), st.floats(0, 2))
def test_left_out_inputs_count_as_zero(
    shape: tuple[int, int, int], dtype: torch.dtype, threshold: float
) -> None:
    outputs, inputs, seed = shape
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    x, bias = torch.randn(inputs, generator=generator), torch.randn(outputs, generator=generator)
    columns = cpu_sparse.linear(weight, bias)
    kept = torch.where(x.abs() > threshold, x, 0).double()
    close(columns(x, threshold), weight.double() @ kept + bias)
    assert columns.used == int((kept != 0).sum())
    close(columns.wide(slice(0, inputs)).T, weight.float(), 0)


def integers(
    outputs: int, inputs: int, scheme: Scheme, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 1 << scheme.bits, (outputs, inputs), generator=generator).to(torch.uint8)
    groups = scheme.groups(inputs)
    scale = (torch.rand(outputs, groups, generator=generator) + 0.1).bfloat16()
    zero = torch.randint(0, 1 << scheme.bits, scale.shape, generator=generator).to(torch.uint8)
    return q, scale, None if scheme.symmetric else zero


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [16, 32, 64, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_leaves_out_and_adds_up_as_the_dense_kernel_does(
    bits: int, group: int, symmetric: bool
) -> None:
    scheme = Scheme(bits, group, symmetric)
    parts = integers(83, 192, scheme, 3)
    columns = cpu_sparse.packed(*parts, scheme, None)
    x = torch.randn(192, generator=torch.Generator().manual_seed(5)) * 3
    wanted = cpu_w4a8.reference(x[None], *parts, scheme)[0]
    close(columns(x, 0.0), wanted)
    close(columns(torch.full((192,), 2.0), 0.0), wanted_of(torch.full((192,), 2.0), parts, scheme))
    rounded = torch.where(x.abs() > 1, x, 0)
    some = columns(x, 1.0)
    assert columns.used == int((rounded != 0).sum())
    close(some, wanted_of(rounded, parts, scheme), 0.02)


def wanted_of(
    x: torch.Tensor,
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    scheme: Scheme,
) -> torch.Tensor:
    return cpu_w4a8.reference(x[None], *parts, scheme)[0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_gathered_int4_is_unpack_and_gather(symmetric: bool) -> None:
    scheme = Scheme(4, 32, symmetric)
    parts = integers(83, 192, scheme, 4)
    keep = torch.randperm(192, generator=torch.Generator().manual_seed(1))[:70].sort().values
    columns = cpu_sparse.packed(*parts, scheme, None)
    small = gather_columns(columns, keep)
    assert torch.equal(small.wide(slice(0, 70)), columns.wide(slice(0, 192))[keep])
    x = torch.randn(70, generator=torch.Generator().manual_seed(2))
    close(small(x), x @ small.wide(slice(0, 70)), 0.02)
    rows = torch.tensor([3, 8, 9, 40, 82])
    weight = cpu_w4a8.Weight(*parts, scheme, torch.arange(83.0))
    y = torch.randn(2, 192, generator=torch.Generator().manual_seed(3))
    assert torch.equal(gather_rows(weight, rows)(y), weight(y)[:, rows])


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_gate_leaves_rows_and_columns_out(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    neurons, hidden, seed = shape
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(neurons, hidden, generator=generator).to(dtype)
    down = torch.randn(hidden, neurons, generator=generator).to(dtype)
    x, gate = torch.randn(hidden, generator=generator), torch.randn(neurons, generator=generator)
    rows, columns = cpu_sparse.Rows(up, None), cpu_sparse.linear(down, None)
    y, used = cpu_sparse.gated(rows, columns, x, gate, 0.7)
    kept = torch.where(gate.abs() > 0.7, gate, 0).double()
    close(y, down.double() @ (kept * (up.double() @ x.double())), 1e-4)
    assert used == int((kept != 0).sum())


def test_threads_change_nothing() -> None:
    weight = torch.randn(700, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = torch.randn(300, generator=torch.Generator().manual_seed(1))
    columns, threads = cpu_sparse.linear(weight, None), torch.get_num_threads()
    one = columns(x, 0.5)
    try:
        torch.set_num_threads(2)
        assert torch.equal(columns(x, 0.5), one)
    finally:
        torch.set_num_threads(threads)
