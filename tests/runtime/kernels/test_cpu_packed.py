"""The C attention over packed caches against the torch code it stands in for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optim.runtime import cache_packed
from optim.runtime.attention import Rule, attend
from optim.runtime.cache_packed import PackedLayer, packed_layers
from optim.runtime.kernels import cpu_packed
from optim.runtime.rope import rotate

pytestmark = pytest.mark.skipif(not cpu_packed.usable(), reason="no C compiler here")


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    batch=st.integers(1, 3),
    kv=st.integers(1, 3),
    group=st.integers(1, 7),
    dim=st.sampled_from([16, 48, 64, 80]),
    position=st.integers(0, 150),
    window=st.sampled_from([None, 1, 7, 100]),
    cap=st.sampled_from([None, 3.0]),
    turned=st.booleans(),
    padded=st.booleans(),
)
def test_attention_of_one_token(
    bits: int,
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
    heads = kv * group
    layers = packed_layers(2, batch, kv, dim, torch.device("cpu"), bits)
    past = torch.randn(2, batch, position, kv, dim)
    for layer in layers:
        layer.grow(160)
        for start in range(0, position, 90):  # the second piece makes the first old
            layer.write(past[0, :, start : start + 90], past[1, :, start : start + 90], start)
    ours, theirs = layers
    assert isinstance(ours, PackedLayer)
    qkv = torch.randn(batch, 1, heads + 2 * kv, dim)
    padding = torch.arange(batch).clamp(max=position) if padded else None
    qk, v = qkv[:, :, : heads + kv], qkv[:, :, heads + kv :]
    angles = None
    if turned:
        half = torch.randn(batch if padded else 1, 1, 1, dim // 4 + 1)
        angles = torch.cat((half.cos(),) * 2, -1), torch.cat((-half.sin(), half.sin()), -1)
        qk = rotate(qk, *angles)
    theirs.write(qk[:, :, heads:], v, position)
    wanted = attend(qk[:, :, :heads], theirs, position, Rule(0.4, window, cap), padding)[:, 0]
    got = cpu_packed.attend(
        qkv[:, 0].clone(),
        ours,
        position,
        scale=0.4,
        window=window,
        cap=cap,
        angles=angles,
        padding=padding,
    )
    # A value on the border of two codes may fall to either: one step of 255.
    torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)
    assert isinstance(theirs, PackedLayer)
    for mine, other in zip(ours.whole(position + 1), theirs.whole(position + 1), strict=True):
        assert (mine - other).abs().max() < 0.05
        assert (mine - other).abs().mean() < 1e-4


def test_old_positions_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_packed, "RECENT", 4)
    (layer,) = packed_layers(1, 1, 1, 16, torch.device("cpu"), 4)
    assert isinstance(layer, PackedLayer)
    layer.grow(100)
    for position in range(100):
        q = torch.randn(1, 3, 16)
        qkv = torch.cat((q, torch.randn(1, 2, 16)), 1)
        got = cpu_packed.attend(
            qkv, layer, position, scale=1.0, window=None, cap=None, angles=None, padding=None
        )
        chances = torch.softmax(layer.scores(q, 0, position + 1, 1.0), -1)
        wanted = layer.mix(chances, 0, position + 1)
        torch.testing.assert_close(got.view(1, 3, 16), wanted, rtol=1e-4, atol=1e-4)
    assert layer.base > 90
