"""The static-integer kernels in Triton's interpreter: bit for bit the integers of the reference."""

import pytest
import torch

triton = pytest.importorskip("triton")

from optim.runtime.decoder.linears import static_int as static_linear  # noqa: E402
from optim.runtime.decoder.linears.static_int import StepLinear, StepNorm  # noqa: E402
from optim.runtime.formats.static_int import (  # noqa: E402
    Exact,
    StaticSite,
    accumulate,
    pack_nibbles,
)
from optim.runtime.kernels.triton import static_int as triton_w4a8  # noqa: E402

G = torch.Generator


@pytest.mark.parametrize("tokens", [1, 3, 16, 65])
@pytest.mark.parametrize(("outputs", "inputs"), [(40, 96), (17, 576), (130, 640)])
def test_product_is_exact(tokens: int, outputs: int, inputs: int) -> None:
    generator = G().manual_seed(tokens)
    codes = torch.randint(-128, 128, (tokens, inputs), generator=generator).to(torch.int8)
    codes[0] = -128
    u = torch.randint(0, 16, (outputs, inputs), generator=generator, dtype=torch.uint8)
    sums = codes.sum(1, dtype=torch.int32)
    got = triton_w4a8.product(codes, sums, pack_nibbles(u))
    assert torch.equal(got, accumulate(codes, u))


def test_the_unpacked_product_is_exact() -> None:
    generator = G().manual_seed(0)
    codes = torch.randint(-128, 128, (24, 100), generator=generator).to(torch.int8)
    u = torch.randint(0, 16, (13, 100), generator=generator, dtype=torch.uint8)
    got = triton_w4a8._unpacked_once(codes, pack_nibbles(u))
    assert torch.equal(got, accumulate(codes, u))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("split", [False, True])
def test_norm_emits_the_reference_s_codes(bits: int, split: bool) -> None:
    generator = G().manual_seed(1)
    x = torch.randn(5, 100, generator=generator)
    index = torch.tensor([3, 3, *range(100)], dtype=torch.int32) if split else None
    columns = 102 if split else 100
    gain = (torch.rand(columns, generator=generator) + 0.5) * (3 if bits == 4 else 40)
    parts = {"gain": gain, "shift": torch.randn(columns, generator=generator) / 3}
    if index is not None:
        parts["index"] = index
    norm = StepNorm(StaticSite(parts, bits, None, Exact()), 1e-5)
    codes, sums = triton_w4a8.norm_codes(x, gain, norm.site.offset, index, 1e-5, bits)
    assert (codes.float() - norm(x)).abs().max() <= 1  # a tie may fall either way
    assert (codes.float() != norm(x)).float().mean() < 2e-3
    assert torch.equal(sums, codes.sum(1, dtype=torch.int32))


def test_modules_take_what_the_kernels_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm of int8 codes and a product of them, as on a GPU, against the same in torch."""
    generator = G().manual_seed(4)
    site = StaticSite({"gain": torch.full((64,), 3.0)}, 4, None, Exact())
    u = torch.randint(0, 16, (24, 64), generator=generator, dtype=torch.uint8)
    norm = StepNorm(site, 1e-5)
    linear = StepLinear(pack_nibbles(u), torch.rand(24, generator=generator), None, 4, None)
    x = torch.randn(2, 3, 64, generator=generator)
    wanted = linear(norm(x))
    monkeypatch.setattr(static_linear, "fast_norm", lambda device: triton_w4a8.norm_codes)
    whole = triton_w4a8.whole
    monkeypatch.setattr(
        static_linear, "fast_product", lambda device: lambda c, p: whole(c, p).float()
    )
    assert norm(x).dtype == torch.int8
    assert torch.allclose(linear(norm(x)), wanted, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 16, 64, 1000])
@pytest.mark.parametrize("inputs", [576, 640, 1536, 4096, 14336])
def test_product_on_a_gpu(tokens: int, inputs: int) -> None:
    generator = G().manual_seed(0)
    codes = torch.randint(-128, 128, (tokens, inputs), generator=generator).to(torch.int8)
    u = torch.randint(0, 16, (96, inputs), generator=generator, dtype=torch.uint8)
    sums = codes.sum(1, dtype=torch.int32)
    got = triton_w4a8.product(codes.cuda(), sums.cuda(), pack_nibbles(u).cuda())
    assert torch.equal(got.cpu(), accumulate(codes, u))
