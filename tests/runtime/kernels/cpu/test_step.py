"""The C kernels of a decode step against the torch code they stand in for."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optim.runtime.architecture.rope import rotate
from optim.runtime.cache import quantized
from optim.runtime.cache.attention import Rule, attend
from optim.runtime.cache.full import Layer, static_layers
from optim.runtime.cache.quantized import PackedLayer, packed_layers
from optim.runtime.kernels.cpu import step as cpu_step

CPU = torch.device("cpu")
HALF = cpu_step.usable() and cpu_step.reads_half()
KINDS = [torch.float32, *([torch.float16] if HALF else []), 8, 4]
pytestmark = [
    pytest.mark.skipif(not cpu_step.usable(), reason="no C compiler here"),
    pytest.mark.usefixtures("isa"),
]


def layers_of(kind: int | torch.dtype, batch: int, kv: int, dim: int) -> list[Layer]:
    """Two empty layers that keep values so."""
    if isinstance(kind, int):
        return packed_layers(2, batch, kv, dim, CPU, kind)
    return static_layers(2, batch, kv, dim, CPU, kind)


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    batch=st.integers(1, 3),
    kv=st.integers(1, 3),
    group=st.integers(1, 7),
    dim=st.sampled_from([16, 24, 40, 48, 64, 80]),
    position=st.integers(0, 150),
    window=st.sampled_from([None, 1, 7, 100]),
    cap=st.sampled_from([None, 3.0]),
    turned=st.booleans(),
    padded=st.booleans(),
)
def test_attention_of_one_token(
    kind: int | torch.dtype,
    batch: int,
    kv: int,
    group: int,
    dim: int,
    position: int,
    window: int | None,
    cap: float | None,
    turned: bool,
    padded: bool,
) -> None:
    torch.manual_seed(position)
    heads, codes = kv * group, isinstance(kind, int)
    dim -= dim % 16 if codes else 0
    ours, theirs = layers = layers_of(kind, batch, kv, dim)
    past = torch.randn(2, batch, position, kv, dim)
    for layer in layers:
        layer.grow(160)
        for start in range(0, position, 90):  # the second piece makes the first old
            layer.write(past[0, :, start : start + 90], past[1, :, start : start + 90], start)
    qkv = torch.randn(batch, 1, heads + 2 * kv, dim)
    padding = torch.arange(batch).clamp(max=position) if padded else None
    qk, v = qkv[:, :, : heads + kv], qkv[:, :, heads + kv :]
    angles = None
    if turned:
        half = torch.randn(batch if padded else 1, 1, 1, dim // 4 + 1)
        angles = torch.cat((half.cos(),) * 2, -1), torch.cat((-half.sin(), half.sin()), -1)
        qk = rotate(qk, *angles)
    theirs.write(qk[:, :, heads:], v, position)
    rule = Rule(0.4, window, cap)
    wanted = attend(qk[:, :, :heads], theirs, position, rule, padding)[:, 0]
    kernel = cpu_step.Attend(heads, kv, dim, 0.4, window, cap or 0.0)
    assert cpu_step.reads(ours)
    got = kernel(qkv[:, 0].clone(), ours, position, angles, padding)
    # A value on the border of two codes may fall to either: one step of 255.
    bound = 2e-2 if codes else 1e-4
    torch.testing.assert_close(got, wanted, rtol=bound, atol=bound)
    for mine, other in zip(_held(ours, position + 1), _held(theirs, position + 1), strict=True):
        assert (mine - other).abs().max() < (0.05 if codes else 4e-3)
        assert (mine - other).abs().mean() < 1e-4


def _held(layer: Layer, end: int) -> tuple[Tensor, Tensor]:
    if isinstance(layer, PackedLayer):
        return layer.whole(end)
    state = layer.state(end)
    return state["keys"].float(), state["values"].float()


def test_old_positions_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "RECENT", 4)
    layer = packed_layers(1, 1, 1, 16, CPU, 4)[0]
    assert isinstance(layer, PackedLayer)
    layer.grow(100)
    kernel = cpu_step.Attend(3, 1, 16, 1.0, None, 0.0)
    for position in range(100):
        q = torch.randn(1, 3, 16)
        qkv = torch.cat((q, torch.randn(1, 2, 16)), 1)
        got = kernel(qkv, layer, position, None, None)
        chances = torch.softmax(layer.scores(q, 0, position + 1, 1.0), -1)
        wanted = layer.mix(chances, 0, position + 1)
        torch.testing.assert_close(got.view(1, 3, 16), wanted, rtol=1e-4, atol=1e-4)
    assert layer.base > 90


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
