"""The C product of static integers: the reference's integers, on every kind of size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optim.runtime.formats.static_int import accumulate, limits, pack_nibbles
from optim.runtime.kernels.cpu import static_int

pytestmark = [
    pytest.mark.skipif(not static_int.usable(), reason="no C compiler"),
    pytest.mark.usefixtures("isa"),
]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 150), st.integers(1, 200), st.booleans(), st.integers(0, 999)
)
def test_exact(tokens: int, outputs: int, half: int, wide: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low, high = limits(8 if wide else 4)
    codes = torch.randint(low, high + 1, (tokens, 2 * half), generator=generator).to(torch.int8)
    u = torch.randint(0, 16, (outputs, 2 * half), generator=generator, dtype=torch.uint8)
    got = static_int.product(codes, pack_nibbles(u))
    assert torch.equal(got, accumulate(codes, u).float())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("inputs", [576, 1536, 4096, 14336])
def test_extremes_of_long_rows(threads: int, inputs: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        codes = torch.full((5, inputs), -128, dtype=torch.int8)
        codes[1] = 127
        u = torch.full((130, inputs), 15, dtype=torch.uint8)
        u[1] = 0
        got = static_int.product(codes, pack_nibbles(u))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got, accumulate(codes, u).float())
