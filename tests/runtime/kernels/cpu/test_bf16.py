"""bf16 weights times a few tokens, at every level of instructions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optim.runtime.kernels.cpu import bf16


@pytest.fixture(scope="module", autouse=True)
def kernel(isa: str) -> None:
    if not bf16.usable():
        pytest.skip("no C compiler here")


@given(st.integers(1, 18), st.integers(1, 140), st.integers(1, 150), st.integers(0, 1 << 30))
@settings(max_examples=60, deadline=None, database=None)
def test_a_token_gets_what_it_gets_alone(tokens: int, outputs: int, inputs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator).to(torch.bfloat16)
    x = torch.randn(tokens, inputs, generator=generator)
    got = bf16.linear(x, weight)
    assert torch.equal(got, torch.cat([bf16.linear(row, weight) for row in torch.split(x, 1)]))
    wanted = bf16.reference(x, weight)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)
