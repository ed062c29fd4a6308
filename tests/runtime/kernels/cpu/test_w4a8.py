"""The C kernel: equal to its reference, and what 8-bit activations cost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optim.runtime.formats.bits import pack_rows
from optim.runtime.formats.pack_quantized import Scheme, dequantize
from optim.runtime.kernels.compile import NoKernel
from optim.runtime.kernels.cpu import w4a8
from optim.runtime.kernels.door import WrongTensor


def compiled() -> bool:
    try:
        w4a8.load()
    except NoKernel:
        return False
    return True


pytestmark = pytest.mark.usefixtures("isa")
needs_compiler = pytest.mark.skipif(not compiled(), reason="no C compiler, or not for this CPU")


def layer(
    scheme: Scheme, outputs: int, inputs: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    top = 1 << scheme.bits
    q = torch.randint(0, top, (outputs, inputs), generator=generator).to(torch.uint8)
    shape = (outputs, scheme.groups(inputs))
    scale = (torch.rand(shape, generator=generator) + 0.1).to(dtype)
    zero = torch.randint(0, top, shape, generator=generator).to(torch.uint8)
    if scheme.offset:
        return q, scale, torch.randn(shape, generator=generator).to(dtype)
    return q, scale, None if scheme.symmetric else zero


@needs_compiler
@given(
    bits=st.sampled_from((2, 3, 4, 5, 6, 8)),
    group=st.sampled_from((16, 32, 48, 64, 128, 256, -1)),
    kind=st.sampled_from(((True, False), (False, False), (False, True))),
    groups=st.integers(1, 3),
    outputs=st.integers(1, 70),
    tokens=st.integers(1, 9),
    dtype=st.sampled_from((torch.bfloat16, torch.float16, torch.float32)),
)
@settings(max_examples=80, deadline=None)
def test_kernel_equals_reference(
    bits: int,
    group: int,
    kind: tuple[bool, bool],
    groups: int,
    outputs: int,
    tokens: int,
    dtype: torch.dtype,
) -> None:
    scheme = Scheme(bits, group, *kind)
    inputs = group * groups if group > 0 else 41 * groups
    q, scale, zero = layer(scheme, outputs, inputs, dtype)
    bias = torch.randn(outputs)
    x = torch.randn(tokens, inputs) * torch.logspace(-3, 3, inputs)
    wanted = w4a8.reference(x, q, scale, zero, scheme) + bias
    got = w4a8.Weight(q, scale, zero, scheme, bias)(x)
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
def test_many_tokens_and_threads_change_nothing(threads: int) -> None:
    scheme = Scheme(4, 32, False)
    weight = w4a8.Weight(*layer(scheme, 300, 128, torch.bfloat16), scheme, None)
    x = torch.randn(261, 128)
    torch.set_num_threads(threads)
    together = weight(x)
    apart = torch.cat([weight(x[i : i + 1]) for i in range(261)])
    assert torch.equal(together, apart)


@needs_compiler
def test_extremes_of_the_activations() -> None:
    scheme = Scheme(4, 32, True)
    q, scale, _ = layer(scheme, 9, 64, torch.float32)
    weight = w4a8.Weight(q, scale, None, scheme, None)
    assert torch.equal(weight(torch.zeros(2, 64)), torch.zeros(2, 9))
    assert weight(torch.full((1, 64), 1e30)).isfinite().all()
    x = torch.randn(2, 64)
    x[1, 5] = torch.nan
    y = weight(x)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


@needs_compiler
def test_largest_products_do_not_overflow() -> None:
    for bits in (4, 8):
        scheme = Scheme(bits, 64, False)
        for value, zero in ((0, (1 << bits) - 1), ((1 << bits) - 1, 0)):
            q = torch.full((8, 128), value, dtype=torch.uint8)
            zeros = torch.full((8, 2), zero, dtype=torch.uint8)
            scale = torch.ones(8, 2)
            for x in (torch.ones(1, 128), -torch.ones(1, 128)):
                y = w4a8.Weight(q, scale, zeros, scheme, None)(x)
                torch.testing.assert_close(y, x @ dequantize(q, scale, zeros, scheme).T)


@pytest.mark.parametrize("group", [16, 32, 64, 128, -1])
def test_eight_bit_activations_cost_less_than_one_percent(group: int) -> None:
    """A rounding error is uniform in half a step, peak/254: for normal inputs a run of 64 peaks at
    about 2.4 standard deviations, so the relative error is about 2.4 / 254 / sqrt(3) = 0.55 %."""
    scheme = Scheme(4, group, True)
    q, scale, zero = layer(scheme, 64, 1024, torch.float32)
    x = torch.randn(32, 1024, generator=torch.Generator().manual_seed(1))
    exact = x.double() @ dequantize(q, scale, zero, scheme).double().T
    error = (w4a8.reference(x, q, scale, zero, scheme) - exact).norm() / exact.norm()
    assert 0.001 < error < 0.0075


@pytest.mark.parametrize(("outputs", "inputs"), [(5, 64), (33, 24), (16, 72), (7, 19)])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_blocks_of_a_weight(outputs: int, inputs: int, bits: int) -> None:
    """Made in C, from integers and from words: what is written out here."""
    q = torch.randint(0, 1 << bits, (outputs, inputs), dtype=torch.uint8)
    rows, columns, flip = w4a8.load().optim_rows(), -(-inputs // 64) * 64, (bits == 8) * 0x80
    padded = torch.zeros(-(-outputs // rows) * rows, columns, dtype=torch.uint8)
    padded[:outputs, :inputs] = q ^ flip
    words = padded.view(torch.int32)
    if bits == 4:
        words = words[:, 0::2] | words[:, 1::2] << 4
    wanted = words.view(-1, rows, words.shape[1]).transpose(1, 2)
    assert torch.equal(w4a8._blocks(q, bits, columns, flip), wanted)
    assert torch.equal(w4a8._blocks(q.T.contiguous().T, bits, columns, flip), wanted)
    if bits == 4:
        assert torch.equal(w4a8._blocks(pack_rows(q, 4), 4, columns, 0), wanted)


def test_a_weight_wider_than_its_columns_is_refused() -> None:
    for q, bits in ((torch.zeros(2, 72, dtype=torch.uint8), 8), (torch.zeros(2, 9).int(), 4)):
        with pytest.raises(WrongTensor):
            w4a8._blocks(q, bits, 64, 0)
