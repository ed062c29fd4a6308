"""Error feedback: the factor, the two forms of the inner loop, and what it is for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optim.quant import gptq
from optim.quant.grid import Grid, nearest, restore, round_to
from optim.runtime.formats.pack_quantized import Scheme


def _gram(columns: int, seed: int, tokens: int = 400) -> Tensor:
    """Of correlated inputs with a few strong channels."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator) @ (mix + 0.3)
    x *= torch.randn(columns, generator=generator).exp()
    return x.T @ x / tokens


def _error(weight: Tensor, q: Tensor, grid: Grid, gram: Tensor) -> Tensor:
    e = weight - restore(q, grid)
    return ((e @ gram) * e).sum(-1)


@pytest.mark.parametrize("strip", [512, 48, 20])
def test_the_factor_gives_back_the_gram_matrix(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "STRIP", strip)
    gram = _gram(48, seed=1)
    fed = gptq.feedback(gram.clone(), 0.01)
    assert fed.damping == 0.01
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(48)
    wanted = damped[fed.order][:, fed.order].double()
    unit = fed.factor.triu(1).double().T + torch.eye(48)  # L / diag L
    squares = torch.linalg.solve_triangular(unit, wanted, upper=False)
    squares = torch.linalg.solve_triangular(unit, squares.mT, upper=False)  # the diagonal L_kk^2
    assert torch.allclose(squares, torch.diag(squares.diagonal()), atol=1e-4 * wanted.max())
    assert bool((squares.diagonal() > 0).all())
    assert torch.equal(fed.order.sort().values, torch.arange(48))
    assert bool((gram.diagonal()[fed.order].diff() >= 0).all())
    assert torch.allclose(fed.gram(), damped, rtol=1e-6)


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_too_few_tokens_raise_the_damping(tokens: int) -> None:
    x = torch.randn(tokens, 40)
    gram = x.T @ x / max(tokens, 1)
    fed = gptq.feedback(gram.clone(), 1e-9)
    assert fed.factor.isfinite().all()
    assert fed.damping >= 1e-9
    again = gptq.feedback(gram.clone(), fed.damping)  # what was tried before left no trace
    assert torch.equal(again.factor, fed.factor)


def test_a_channel_never_active_rounds_plainly() -> None:
    gram = _gram(32, seed=2)
    gram[5], gram[:, 5] = 0, 0
    weight = torch.randn(6, 32)
    q, grid = nearest(weight, Scheme(4, 16, False), torch.float32)
    fed = gptq.round_with_feedback(weight, grid, gptq.feedback(gram.clone(), 0.01))
    assert torch.equal(fed[:, 5], q[:, 5])
    assert not torch.equal(fed, q)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 150), st.integers(1, 40), st.sampled_from([2, 3, 4, 8]), st.integers(0, 2**31)
)
def test_the_compiled_loop_equals_the_reference(
    rows: int, columns: int, bits: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(columns, rows, generator=generator)
    owed = torch.randn(columns, rows, generator=generator) * 0.1
    scale = torch.rand(columns, rows, generator=generator) * 0.3 + 0.1
    zero = torch.randint(0, 2**bits, (columns, rows), generator=generator).float()
    factor = (torch.randn(columns, columns, generator=generator) * 0.2).triu(1)
    args = (w + owed, w, scale, zero, factor, float(2**bits - 1))
    q, error = gptq._round_block(*args)
    wanted_q, wanted_error = gptq.round_block_reference(*args)
    # Sums in another order may round a value that is a tie to the other side, and all after it.
    same = (q == wanted_q).all(0)
    assert same.float().mean() >= 0.9 or rows < 10
    assert torch.allclose(error[:, same], wanted_error[:, same], atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("columns", [64, 320])  # below and above one block of columns
def test_the_output_error_falls(bits: int, columns: int) -> None:
    weight = torch.randn(40, columns, generator=torch.Generator().manual_seed(3))
    gram = _gram(columns, seed=4)
    q, grid = nearest(weight, Scheme(bits, 32, False), torch.bfloat16)
    fed = gptq.round_with_feedback(weight, grid, gptq.feedback(gram.clone(), 0.01))
    assert fed.min() >= 0 and fed.max() <= grid.top and torch.equal(fed, fed.round())
    assert _error(weight, fed, grid, gram).sum() < 0.7 * _error(weight, q, grid, gram).sum()


def test_blocks_of_columns_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(5)).double().float()
    _, grid = nearest(weight, Scheme(3, 32, False), torch.float32)
    fed = gptq.feedback(_gram(96, seed=6), 0.01)
    whole = gptq.round_with_feedback(weight, grid, fed)
    monkeypatch.setattr(gptq, "BLOCK", 20)
    assert (gptq.round_with_feedback(weight, grid, fed) == whole).all(-1).float().mean() >= 0.75


def test_independent_inputs_round_plainly() -> None:
    weight = torch.randn(8, 64)
    q, grid = nearest(weight, Scheme(4, 32, True), torch.float32)
    fed = gptq.feedback(torch.eye(64) * 3, 0.01)
    assert torch.equal(gptq.round_with_feedback(weight, grid, fed), q)
    assert torch.equal(q, round_to(weight, grid))
