"""The C kernels of a decode step against the torch code they stand in for."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from optim.runtime.attention import Rule, attend
from optim.runtime.cache import LayerCache
from optim.runtime.kernels import cpu_step
from optim.runtime.rope import rotate

HALF = cpu_step.usable() and cpu_step.reads_half()
DTYPES = [torch.float32, torch.float16] if HALF else [torch.float32]
pytestmark = pytest.mark.skipif(not cpu_step.usable(), reason="no C compiler here")


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    kv=st.integers(1, 3),
    group=st.integers(1, 7),
    dim=st.sampled_from([2, 6, 13, 16, 40, 64]),
    dtype=st.sampled_from(DTYPES),
    position=st.integers(0, 60),
    window=st.sampled_from([None, 1, 7, 100]),
    cap=st.sampled_from([None, 3.0]),
    turned=st.booleans(),
    padded=st.booleans(),
)
def test_attention_of_one_token(
    batch: int,
    kv: int,
    group: int,
    dim: int,
    dtype: torch.dtype,
    position: int,
    window: int | None,
    cap: float | None,
    turned: bool,
    padded: bool,
) -> None:
    torch.manual_seed(position)
    heads = kv * group
    ours = LayerCache(False, *torch.randn(2, batch * kv, 64, dim).to(dtype))
    theirs = LayerCache(False, ours.keys.clone(), ours.values.clone())
    qkv = torch.randn(batch, 1, heads + 2 * kv, dim)
    padding = torch.arange(batch).clamp(max=position) if padded else None
    qk, v = qkv[:, :, : heads + kv], qkv[:, :, heads + kv :]
    angles = None
    if turned and dim > 2:
        half = torch.randn(batch if padded else 1, 1, 1, dim // 4 + 1)
        angles = torch.cat((half.cos(),) * 2, -1), torch.cat((-half.sin(), half.sin()), -1)
        qk = rotate(qk, *angles)
    theirs.write(qk[:, :, heads:], v, position)
    rule = Rule(0.4, window, cap)
    wanted = attend(qk[:, :, :heads], theirs, position, rule, padding)[:, 0]
    kernel = cpu_step.Attend(heads, kv, dim, 0.4, window, cap or 0.0)
    qkv = qkv[:, 0].clone()
    got = kernel(qkv, ours.keys, ours.values, position, angles, padding)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    # Turned keys differ in the last bit of fp32, which may decide how they round to fp16.
    torch.testing.assert_close(ours.keys.float(), theirs.keys.float(), rtol=1e-3, atol=1e-6)
    assert torch.equal(ours.values, theirs.values)


@pytest.mark.parametrize("shape", [(1, 1, 7), (3, 2, 72), (5, 1)])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e6])
def test_rms_norm(shape: tuple[int, ...], size: float) -> None:
    x, weight = torch.randn(shape) * size, torch.randn(shape[-1])
    wanted = F.rms_norm(x.double(), shape[-1:], weight.double(), 1e-6)
    torch.testing.assert_close(
        cpu_step.rms_norm(x, weight, 1e-6).double(), wanted, rtol=1e-5, atol=1e-6
    )


def test_swiglu_also_far_from_zero() -> None:
    gate = torch.cat((torch.linspace(-200, 200, 401), torch.randn(30) * 3))
    up = torch.randn(431)
    got = cpu_step.swiglu(torch.stack((torch.cat((gate, up)), torch.cat((up, gate)))))
    wanted = torch.stack((F.silu(gate) * up, F.silu(up) * gate))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
