"""Static integers: packing, the exact product, and the integer path against fake quantization."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optim.recipes.errors import OptimError
from optim.runtime.decoder.linears.static_int import StepLinear, StepNorm
from optim.runtime.formats.static_int import (
    Exact,
    Static,
    StaticSite,
    TokenSite,
    accumulate,
    check_linear,
    limits,
    pack_nibbles,
    plain_product,
    read_config,
    unpack_nibbles,
)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _nibbles(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(0, 2**31))
def test_nibbles_come_back(rows: int, columns: int, seed: int) -> None:
    u = _nibbles(rows, columns, seed)
    packed = pack_nibbles(u)
    assert packed.shape == (rows, -(-columns // 2)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_nibbles(packed, columns), u)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [2, 64, 577 + 1, 17000])
def test_the_float_product_is_the_integer_product(bits: int, columns: int) -> None:
    """Bit-equal to int32, with codes at their limits, however long the row."""
    low, high = limits(bits)
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(low, high + 1, (5, columns), generator=generator)
    codes[0], codes[1] = low, high
    u = _nibbles(7, columns)
    u[0], u[1] = 0, 15
    wanted = accumulate(codes.to(torch.int8), u)
    got = plain_product(codes.float(), pack_nibbles(u), bits)
    if columns < 8192 or bits == 4:
        assert torch.equal(got.to(torch.int32), wanted)
    else:  # the pieces are exact, their sum passes 2^24
        assert (got.double() - wanted).abs().max() <= 2


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_integer_path_is_fake_quantization(bits: int, dtype: torch.dtype) -> None:
    """norm -> codes -> integers -> scale, against rounding and a dense product, in float64."""
    n, out, eps = 96, 40, 1e-5
    x, gain = _random(6, n) * 3, 1 + 0.3 * _random(n, seed=1)
    step, center = 0.1 + _random(n, seed=2).abs(), 0.2 * _random(n, seed=3)
    if bits == 8:
        step = step / 16
    u, scale, bias = _nibbles(out, n), 0.01 + _random(out, seed=4).abs() / 50, _random(out, seed=5)
    site = StaticSite({"gain": gain / step, "shift": center / step}, bits, None, Exact())
    norm = StepNorm(site, eps)
    linear = StepLinear(pack_nibbles(u), scale, bias, bits, None)
    codes = norm(x)
    acc = accumulate(codes.to(torch.int8), u).to(dtype)
    normed = x.to(dtype) * torch.rsqrt(x.to(dtype).square().mean(-1, keepdim=True) + eps) * gain
    fake = ((normed - center) / step + 0.5).floor().clamp(*limits(bits))
    weight = (u.to(dtype) - 8) * scale[:, None] / step  # W = W' / step
    wanted = (fake * step) @ weight.T + bias
    assert torch.equal(fake.to(torch.int8), codes.to(torch.int8))
    assert torch.allclose(linear(codes).to(dtype), wanted, rtol=1e-5, atol=1e-5)
    if dtype == torch.float64:
        exact = acc * scale + bias
        assert torch.allclose(exact, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_dithered_copies_round_k_times_finer(k: int) -> None:
    """Hermite: sum over m of floor(z + (m + 1/2) / k) = floor(k z + 1/2)."""
    z = _random(5000).double() * 2
    copies = sum((z + (m + 0.5) / k).floor() for m in range(k))
    assert torch.equal(copies, (k * z + 0.5).floor())


def test_leading_positions_stay_unrounded() -> None:
    parts = {"gain": torch.full((4,), 2.0), "shift": torch.full((4,), 0.25)}
    site = StaticSite(parts, 4, None, Exact(2))
    x = _random(1, 5, 4) * 100
    codes = site(x)[0]
    assert torch.equal(codes[:, :2], x[:, :2] * 2 - 0.25)
    assert codes[:, 2:].abs().max() <= 8 and torch.equal(codes[:, 2:], codes[:, 2:].floor())


def test_a_token_site_scales_each_token() -> None:
    site = TokenSite(1.0, 8, None)
    x = _random(3, 64) * torch.tensor([[1.0], [100.0], [1e-3]])
    codes, step = site(x)
    assert ((codes * step - x).abs() <= step * 0.51).all()
    assert site(torch.zeros(1, 8))[0].abs().max() == 0


def test_an_odd_number_of_columns() -> None:
    u = _nibbles(3, 7)
    linear = StepLinear(pack_nibbles(u), torch.ones(3), None, 4, None)
    codes = torch.arange(-3.0, 4.0)[None]
    assert torch.equal(linear(codes), (codes @ (u.float() - 8).T))


def test_config_is_read_back_and_nonsense_refused() -> None:
    bits, kinds = {"norm": 4, "out": 4, "down": 8}, dict.fromkeys(("norm", "out", "down"), "static")
    static = Static(bits, kinds, True, (1, 7))
    assert read_config(static.config()) == static
    assert read_config({"quant_method": "compressed-tensors"}) is None and read_config(None) is None
    wrongs: tuple[dict[str, object], ...] = (
        {"format_version": 2},
        {"weight_bits": {"a": 4}},
        {"activation_bits": {"norm": 5}},
        {"activation_bits": bits | {"down": 8.0}},
        {"prefix": "x"},
        {"prefix": [True]},
        {"prefix": [-1]},
    )
    for wrong in wrongs:
        with pytest.raises(OptimError, match="not one of version 1"):
            read_config(static.config() | wrong)


def test_linears_that_do_not_fit_are_named() -> None:
    good = {"weight_packed": torch.zeros(3, 4, dtype=torch.uint8), "weight_scale": torch.ones(3)}
    check_linear("a", good)
    for wrong in ({"weight_scale": torch.ones(4)}, {"weight_scale": torch.full((3,), torch.nan)}):
        with pytest.raises(OptimError, match="a cannot be used"):
            check_linear("a", good | wrong)
    with pytest.raises(OptimError):
        check_linear("a", {"weight_scale": torch.ones(3)})
