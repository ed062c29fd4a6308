"""The two searches of AWQ: never worse than what they start from, and better where they can be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optim.quant import awq
from optim.quant.awq import Reader, diagonal_blocks, search_clip, search_scale, share_heads
from optim.quant.block_solver import _sampled
from optim.quant.grid import Grid, make_grid, nearest, ranges, restore, round_to
from optim.runtime.formats.pack_quantized import Scheme
from optim.runtime.walk.walk import StoredLinear

SCHEMES = st.builds(
    Scheme, st.sampled_from([2, 3, 4, 8]), st.sampled_from([-1, 16, 32]), st.booleans()
)


def _inputs(columns: int, seed: int, outliers: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, columns, generator=generator)
    return x * (torch.randn(columns, generator=generator) * outliers).exp()


def _reader(rows: int, x: Tensor, scheme: Scheme, seed: int = 0) -> Reader:
    weight = torch.randn(rows, x.shape[1], generator=torch.Generator().manual_seed(seed))
    return Reader(weight, x.T @ x / len(x), scheme)


def _loss(reader: Reader, scale: Tensor) -> float:
    q, grid = nearest(reader.weight * scale, reader.scheme, torch.float32)
    e = restore(q, grid) / scale - reader.weight
    return float(((e @ reader.gram) * e).sum())


def _search(
    readers: list[Reader],
    x: Tensor,
    repeats: tuple[int, int] | None = None,
    forms: tuple[bool, ...] = (False, True),
) -> Tensor:
    magnitude = x.abs().mean(0)
    return search_scale(
        readers, magnitude, n_grid=20, forms=forms, repeats=repeats, dtype=torch.float32
    )


@settings(max_examples=25, deadline=None)
@given(SCHEMES, st.integers(1, 20), st.floats(0, 3), st.integers(0, 2**31))
def test_the_scale_never_loses(scheme: Scheme, rows: int, outliers: float, seed: int) -> None:
    x = _inputs(64, seed, outliers)
    readers = [_reader(rows, x, scheme, seed), _reader(3, x, scheme, seed + 1)]
    scale = _search(readers, x)
    assert scale.shape == (64,) and bool((scale > 0).all()) and bool(scale.isfinite().all())
    before = sum(_loss(r, torch.ones(64)) for r in readers)
    assert sum(_loss(r, scale) for r in readers) <= before * (1 + 1e-5)


@pytest.mark.parametrize("forms", [(False,), (True,), (False, True)])
def test_strong_channels_are_scaled_up(forms: tuple[bool, ...]) -> None:
    x = _inputs(64, seed=1, outliers=0)
    x[:, 7] *= 50
    reader = _reader(64, x, Scheme(3, 32, False))
    scale = _search([reader], x, forms=forms)
    assert scale.argmax() == 7
    assert _loss(reader, scale) < 0.6 * _loss(reader, torch.ones(64))


def test_identity_stays_where_nothing_beats_it() -> None:
    x, scheme = _inputs(64, seed=2), Scheme(4, 16, False)
    q, grid = nearest(torch.randn(16, 64), scheme, torch.float32)
    on_the_grid = restore(q, grid)
    reader = Reader(on_the_grid, x.T @ x, scheme)
    assert _loss(reader, torch.ones(64)) < 1e-6
    assert torch.equal(_search([reader], x), torch.ones(64))


def test_dead_channels_break_nothing() -> None:
    x = _inputs(64, seed=3)
    x[:, :40] = 0
    reader = _reader(8, x, Scheme(2, 16, False))
    reader.weight[:, 10] = 0
    assert bool(_search([reader], x).isfinite().all())


def test_query_heads_share_a_scale() -> None:
    """Two KV heads of 8, three query heads each: what v can hold is the same for all three."""
    x = _inputs(48, seed=4, outliers=2)
    scale = _search([_reader(16, x, Scheme(3, 16, False))], x, repeats=(3, 8))
    heads = scale.view(2, 3, 8)
    assert torch.equal(heads[:, 0], heads[:, 1]) and torch.equal(heads[:, 0], heads[:, 2])
    assert not torch.equal(scale, torch.ones(48))
    by_hand = share_heads(torch.arange(8.0), queries=2, head_dim=2)
    assert by_hand.tolist() == [1, 2, 1, 2, 5, 6, 5, 6]


def _group_losses(weight: Tensor, grid: Grid, gram: Tensor) -> Tensor:
    """e H_gg e of every row and group, one by one."""
    e = (restore(round_to(weight, grid), grid) - weight).double()
    size = weight.shape[1] // grid.scale.shape[1]
    parts = [slice(g, g + size) for g in range(0, weight.shape[1], size)]
    return torch.stack([((e[:, p] @ gram[p, p].double()) * e[:, p]).sum(-1) for p in parts], 1)


@settings(max_examples=25, deadline=None)
@given(SCHEMES, st.integers(1, 20), st.integers(0, 2**31))
def test_clipping_never_loses_in_any_group(scheme: Scheme, rows: int, seed: int) -> None:
    x = _inputs(64, seed)
    reader = _reader(rows, x, scheme, seed)
    found = search_clip(reader.weight, diagonal_blocks(reader.gram, scheme), scheme, torch.bfloat16)
    full = make_grid(*ranges(reader.weight, scheme), scheme, torch.bfloat16)
    before = _group_losses(reader.weight, full, reader.gram)
    after = _group_losses(reader.weight, found, reader.gram)
    assert bool((after <= before + 1e-5 * before.max()).all())
    assert torch.equal(found.scale, found.scale.bfloat16().float())


def test_clipping_gains_at_few_bits() -> None:
    x = _inputs(64, seed=5)
    reader, scheme = _reader(64, x, Scheme(2, 32, False)), Scheme(2, 32, False)
    found = search_clip(reader.weight, diagonal_blocks(reader.gram, scheme), scheme, torch.float32)
    full = make_grid(*ranges(reader.weight, scheme), scheme, torch.float32)
    gain = _group_losses(reader.weight, found, reader.gram).sum()
    assert gain < 0.8 * _group_losses(reader.weight, full, reader.gram).sum()


def test_the_search_samples_tall_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    x = _inputs(64, seed=6)
    reader = _reader(600, x, Scheme(4, 32, False))
    ((rows, gram),) = _sampled(StoredLinear(reader.weight, None), [reader.gram])
    few = Reader(rows, gram, reader.scheme)
    assert awq.LEAST_ROWS <= len(few.weight) < 600
    whole, part = _loss(reader, torch.ones(64)), _loss(few, torch.ones(64))
    assert abs(part / whole - 1) < 0.2  # weighted so that it stands for all rows
