"""Integers moved after feedback: never a larger output error, and the two forms of the loop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optim.quant import descent, gptq
from optim.quant.descent import descend, sweep
from optim.quant.grid import Grid, nearest, restore
from optim.runtime.formats.pack_quantized import Scheme

MakeModel = Callable[..., Path]
Compress = Callable[..., Any]


def _gram(columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(400, columns, generator=generator) @ (mix + 0.3)
    return x.T @ x / 400


def _error(weight: Tensor, q: Tensor, grid: Grid, gram: Tensor) -> Tensor:
    e = (weight - restore(q, grid)).double()
    return ((e @ gram.double()) * e).sum(-1)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([-1, 16, 32]),
    st.booleans(),
    st.sampled_from([64, 160]),
    st.integers(0, 2**31),
)
def test_never_worse(bits: int, size: int, symmetric: bool, columns: int, seed: int) -> None:
    """Of every row; the integers stay integers of the grid, the scales what can be stored."""
    weight = torch.randn(6, columns, generator=torch.Generator().manual_seed(seed))
    gram = _gram(columns, seed)
    q, grid = nearest(weight, Scheme(bits, size, symmetric), torch.bfloat16)
    after, new = descend(weight, q, grid, gram, 2, torch.bfloat16)
    energy = ((weight @ gram) * weight).sum(-1)
    before = _error(weight, q, grid, gram)
    assert bool((_error(weight, after, new, gram) <= before + 1e-5 * energy).all())
    assert after.min() >= 0 and after.max() <= grid.top and torch.equal(after, after.round())
    assert torch.equal(new.scale, new.scale.bfloat16().float()) and torch.equal(new.zero, grid.zero)


@pytest.mark.parametrize("bits", [2, 4])
def test_it_goes_on_where_feedback_ends(bits: int) -> None:
    weight, gram = torch.randn(40, 320, generator=torch.Generator().manual_seed(3)), _gram(320, 4)
    _, grid = nearest(weight, Scheme(bits, 32, False), torch.bfloat16)
    fed = gptq.feedback(gram.clone(), 0.01)
    q = gptq.round_with_feedback(weight, grid, fed)
    damped = fed.gram()
    after, new = descend(weight, q, grid, damped, 2, torch.bfloat16)
    falls = _error(weight, after, new, damped).sum() / _error(weight, q, grid, damped).sum()
    assert falls < 0.95


@pytest.mark.parametrize("keys", [{}, {"method": "gptq"}, {"compensate": False}, {"guide": "loss"}])
def test_a_run_with_sweeps(
    keys: dict[str, Any],
    make_model: MakeModel,
    compress: Compress,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the same damping, other integers: nearer to the block's output on the text."""
    monkeypatch.setattr("optim.quant.block_solver.SCARCE", 0.0)
    model = make_model("llama")
    plain = compress(model, tmp_path / "plain", bits=2, **keys)
    swept = compress(model, tmp_path / "swept", bits=2, sweeps=2, **keys)
    assert swept.blocks[0]["error"] < plain.blocks[0]["error"]


def test_where_no_integer_can_move_none_does() -> None:
    """Independent inputs: the nearest integers are the best, one at a time and together."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    q, grid = nearest(weight, Scheme(4, 32, False), torch.float32)
    gram = torch.eye(64) * 3
    assert torch.equal(sweep(weight, q, grid, gram), q)
    gram[5] = 0  # a channel that was never active
    assert torch.equal(sweep(weight, q, grid, gram), q)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 150), st.integers(1, 40), st.sampled_from([2, 4]), st.integers(0, 2**31))
def test_the_compiled_loop_equals_the_reference(
    rows: int, columns: int, bits: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    top = float(2**bits - 1)
    q = torch.randint(0, 2**bits, (columns, rows), generator=generator).float()
    error, slope = (torch.randn(columns, rows, generator=generator) for _ in "es")
    scale = torch.rand(columns, rows, generator=generator) * 0.3 + 0.1
    corner = _gram(columns, seed)
    mine, theirs = [q.clone(), error.clone()], [q.clone(), error.clone()]
    descent._move(*mine, slope, scale, corner, top)
    descent.move_reference(*theirs, slope, scale, corner, top)
    # Sums in another order may round a value that is a tie to the other side, and all after it.
    same = (mine[0] == theirs[0]).all(0)
    assert same.float().mean() >= 0.9 or rows < 10
    assert torch.allclose(mine[1][:, same], theirs[1][:, same], atol=1e-4)
