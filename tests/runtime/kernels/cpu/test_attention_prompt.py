"""Attention of a prompt in C against torch, and against itself with the prompt cut elsewhere."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optim.runtime.architecture.rope import rotate
from optim.runtime.cache.attention import Rule, attend
from optim.runtime.cache.full import LayerCache
from optim.runtime.kernels.compile import works
from optim.runtime.kernels.cpu import attention_prompt
from optim.runtime.kernels.cpu import step as cpu_step
from optim.runtime.kernels.door import WrongTensor

CPU = torch.device("cpu")
USABLE = works(attention_prompt.check)
HALF = USABLE and cpu_step.reads_half()
DTYPES = [torch.float32, *([torch.float16] if HALF else [])]
pytestmark = [
    pytest.mark.skipif(not USABLE, reason="no C compiler here"),
    pytest.mark.usefixtures("isa"),
]


def empty(rows: int, capacity: int, dim: int, dtype: torch.dtype) -> LayerCache:
    """A layer whose unused positions hold what must not be read."""
    return LayerCache(False, *torch.full((2, rows, capacity, dim), torch.nan, dtype=dtype))


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(1, 2),
    kv=st.integers(1, 3),
    group=st.integers(1, 7),
    dim=st.sampled_from([8, 24, 40, 64, 80, 136]),
    start=st.integers(0, 150),
    tokens=st.integers(2, 140),
    window=st.sampled_from([None, 1, 7, 100]),
    cap=st.sampled_from([None, 3.0]),
    turned=st.booleans(),
    padded=st.booleans(),
)
def test_attention_of_a_prompt(
    dtype: torch.dtype,
    batch: int,
    kv: int,
    group: int,
    dim: int,
    start: int,
    tokens: int,
    window: int | None,
    cap: float | None,
    turned: bool,
    padded: bool,
) -> None:
    torch.manual_seed(start)
    heads = kv * group
    ours, theirs = (empty(batch * kv, start + tokens, dim, dtype) for _ in "ab")
    past = torch.randn(2, batch, start, kv, dim)
    for layer in (ours, theirs):
        layer.write(past[0], past[1], 0)
    qkv = torch.randn(batch, tokens, heads + 2 * kv, dim)
    padding = 3 * torch.arange(batch) if padded else None
    qk, v = qkv[:, :, : heads + kv], qkv[:, :, heads + kv :]
    angles = None
    if turned:
        half = torch.randn(batch if padded else 1, tokens, 1, dim // 4)
        angles = torch.cat((half.cos(),) * 2, -1), torch.cat((-half.sin(), half.sin()), -1)
        qk = rotate(qk, *angles)
    rule = Rule(0.4, window, cap)
    theirs.write(qk[:, :, heads:], v, start)
    got = attention_prompt.attend_prompt(qkv.clone(), ours, start, rule, angles, padding)
    # Over the same keys: a rotated one may lie between two halfs, and fall to either.
    wanted = attend(qk[:, :, :heads], ours, start, rule, padding)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    for mine, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
        torch.testing.assert_close(mine, other, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("cut", [1, 7, 64, 130, 199])
def test_a_prompt_in_pieces_is_the_same_in_every_bit(
    dtype: torch.dtype, window: int | None, cut: int
) -> None:
    qkv, rule = torch.randn(1, 200, 5, 40), Rule(0.4, window)

    def run(*pieces: torch.Tensor) -> torch.Tensor:
        layer, seen, start = empty(1, 200, 40, dtype), [], 0
        for piece in pieces:
            given = piece.clone(memory_format=torch.contiguous_format)
            seen.append(attention_prompt.attend_prompt(given, layer, start, rule, None, None))
            start += piece.shape[1]
        return torch.cat(seen, 1)

    assert torch.equal(run(qkv), run(qkv[:, :cut], qkv[:, cut:]))


def test_what_does_not_fit_is_refused() -> None:
    rule = Rule(1.0)
    for qkv, layer in (
        (torch.randn(1, 4, 6, 16), empty(2, 3, 16, torch.float32)),
        (torch.randn(1, 4, 7, 16), empty(2, 9, 16, torch.float32)),
        (torch.randn(1, 4, 6, 12), empty(2, 9, 12, torch.float32)),
        (torch.randn(1, 4, 6, 16).transpose(1, 2), empty(2, 9, 16, torch.float32)),
    ):
        with pytest.raises(WrongTensor):
            attention_prompt.attend_prompt(qkv, layer, 0, rule, None, None)
