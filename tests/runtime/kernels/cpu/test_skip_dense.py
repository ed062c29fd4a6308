"""Columns that are left out, rows that a gate leaves over: against torch, on odd shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optim.runtime.kernels.cpu import skip_dense

pytestmark = [
    pytest.mark.skipif(not skip_dense.usable(), reason="no C compiler"),
    pytest.mark.usefixtures("isa"),
]
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
    columns = skip_dense.linear(weight, bias)
    kept = torch.where(x.abs() > threshold, x, 0).double()
    close(columns(x, threshold), weight.double() @ kept + bias)
    assert columns.used == int((kept != 0).sum())
    close(columns.wide(slice(0, inputs)).T, weight.float(), 0)


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
    rows, columns = skip_dense.Rows(up, None), skip_dense.linear(down, None)
    y, used = skip_dense.gated(rows, columns, x, gate, 0.7)
    kept = torch.where(gate.abs() > 0.7, gate, 0).double()
    close(y, down.double() @ (kept * (up.double() @ x.double())), 1e-4)
    assert used == int((kept != 0).sum())


def test_threads_change_nothing() -> None:
    weight = torch.randn(700, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = torch.randn(300, generator=torch.Generator().manual_seed(1))
    columns, threads = skip_dense.linear(weight, None), torch.get_num_threads()
    one = columns(x, 0.5)
    try:
        torch.set_num_threads(2)
        assert torch.equal(columns(x, 0.5), one)
    finally:
        torch.set_num_threads(threads)
