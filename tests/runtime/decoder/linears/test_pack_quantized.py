"""PackedLinear: every kernel computes the stored weight, holds little, and joins."""

import pytest
import torch
from torch import Tensor

from optim.recipes.errors import OptimError
from optim.runtime.decoder.linears.pack_quantized import PackedLinear, choose, fuse
from optim.runtime.formats.pack_quantized import Scheme, dequantize, pack
from optim.runtime.kernels import torch_tiles
from optim.runtime.kernels.compile import NoKernel
from optim.runtime.kernels.cpu import torch_int4, w4a8

SCHEMES = [
    Scheme(bits, group, symmetric)
    for bits in (2, 3, 4, 8)
    for group in (16, 32, 64, 96, -1)
    for symmetric in (True, False)
]
CPU = torch.device("cpu")


def usable(module) -> bool:  # type: ignore[no-untyped-def]
    try:
        module.check()
    except NoKernel:
        return False
    return True


KERNELS = [torch_tiles, *(kernel for kernel in (torch_int4, w4a8) if usable(kernel))]
BOUND = {torch_tiles: 1e-5, torch_int4: 1e-2, w4a8: 1.2e-2}


def linear(
    scheme: Scheme, outputs: int = 37, inputs: int = 192, *, bias: bool = True, seed: int = 0
) -> tuple[PackedLinear, Tensor, Tensor | None]:
    """A packed linear of random weights, its dense weight and its bias."""
    generator = torch.Generator().manual_seed(seed)
    top = 1 << scheme.bits
    q = torch.randint(0, top, (outputs, inputs), generator=generator).to(torch.uint8)
    shape = (outputs, scheme.groups(inputs))
    scale = (torch.rand(shape, generator=generator) + 0.2).to(torch.bfloat16)
    zero = torch.randint(top // 4, top - top // 4, shape, generator=generator).to(torch.uint8)
    kept = None if scheme.symmetric else zero
    added = torch.randn(outputs, generator=generator) * 10 if bias else None
    module = PackedLinear(pack(q, scale, kept, scheme), scheme, added)
    return module, dequantize(q, scale, kept, scheme), added


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.__name__.rpartition(".")[2])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_kernel_computes_the_stored_weight(kernel, scheme: Scheme) -> None:  # type: ignore[no-untyped-def]
    module, weight, bias = linear(scheme)
    chosen = kernel if kernel.supports(scheme, CPU) else choose(scheme, CPU)
    module.prepare(chosen)
    for tokens in (1, 3, 4, 33, 200):
        x = torch.randn(tokens, 192, generator=torch.Generator().manual_seed(tokens))
        exact = x @ weight.T
        error = (module(x) - bias - exact).norm() / exact.norm()
        assert error < BOUND[chosen]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_shape_and_dtype_of_the_input_are_kept(scheme: Scheme) -> None:
    module, weight, _ = linear(scheme, bias=False)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 3, 192).to(dtype)
        y = module(x)
        assert y.shape == (2, 3, 37)
        assert y.dtype == dtype
        exact = x.float() @ weight.T
        assert (y.float() - exact).norm() / exact.norm() < 2e-2


@pytest.mark.parametrize("scheme", [Scheme(4, 64, False), Scheme(8, 32, True), Scheme(4, 32, True)])
def test_only_packed_bytes_are_held(scheme: Scheme) -> None:
    module, _, _ = linear(scheme, 320, 576, bias=False)
    before = module.nbytes
    module.prepare()
    assert not list(module.buffers())
    assert module.nbytes <= 1.3 * before


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_joined_linears_are_the_parts_side_by_side(scheme: Scheme) -> None:
    parts = [linear(scheme, outputs, seed=outputs)[0] for outputs in (24, 7, 9)]
    joined = fuse(parts)
    x = torch.randn(5, 192)
    apart = torch.cat([part(x) for part in parts], -1)
    torch.testing.assert_close(joined(x), apart, rtol=1e-4, atol=1e-3)


def test_what_differs_is_not_joined() -> None:
    four, eight = linear(Scheme(4, 32, True))[0], linear(Scheme(8, 32, True))[0]
    with pytest.raises(OptimError, match="cannot be joined"):
        fuse([four, eight])
    plain_one = linear(Scheme(4, 32, True), bias=False)[0]
    with pytest.raises(OptimError, match="cannot be joined"):
        fuse([four, plain_one])
    with pytest.raises(OptimError, match="different inputs"):
        fuse([four, linear(Scheme(4, 32, True), inputs=96)[0]])


def test_a_corrupt_tensor_is_named_before_anything_runs() -> None:
    module, _, _ = linear(Scheme(4, 32, True))
    module.name, module.weight_scale = "layers.3.down", None
    with pytest.raises(OptimError, match=r"layers\.3\.down\.weight_scale"):
        module.prepare()
