"""The packed cache: its codec, its attention against plain tensors, and what it costs a model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optim.recipes.errors import OptimError
from optim.runtime.cache import quantized
from optim.runtime.cache.full import Policy
from optim.runtime.cache.quantized import (
    RECENT,
    PackedLayer,
    dequantize,
    hadamard,
    packed_layers,
    quantize,
)
from optim.runtime.engine.load import load_model

CPU = torch.device("cpu")
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 20), st.sampled_from([2, 6, 20, 64, 80]))


@settings(max_examples=80, deadline=None)
@given(SHAPES, st.sampled_from([4, 8]), st.integers(0, 99), st.sampled_from([1e-3, 1.0, 300.0]))
def test_a_value_comes_back_within_half_a_step(
    shape: tuple[int, ...], bits: int, seed: int, size: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator) + torch.randn(1, generator=generator) * 3) * size
    codes, grid = quantize(x, bits)
    assert codes.shape == (*shape[:-1], shape[-1] * bits // 8)
    assert codes.dtype == torch.uint8
    back = dequantize(codes, grid, bits)
    wide = x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)
    # Half a step, and what rounding step and low to 8 bits of mantissa adds at the ends.
    bound = wide / (2**bits - 1) / 2 + wide / 256 + x.abs().amax(-1, keepdim=True) / 128
    assert ((back - x).abs() <= bound).all()
    again = quantize(back, bits)
    assert (dequantize(*again, bits) - back).abs().le(bound).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_equal_values_come_back_nearly_exact(bits: int) -> None:
    x = torch.tensor([[0.0] * 8, [1.5] * 8, [-2.0] * 8])
    assert torch.equal(dequantize(*quantize(x, bits), bits), x)


@pytest.mark.parametrize("dim", [1, 6, 20, 64, 96])
def test_the_rotation_is_its_own_inverse(dim: int) -> None:
    matrix = hadamard(dim, CPU)
    assert torch.allclose(matrix @ matrix, torch.eye(dim), atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("first", [0, 700, 1100])
def test_attention_reads_codes_as_if_they_were_spread(bits: int, first: int) -> None:
    (layer,) = packed_layers(1, 1, 2, 20, CPU, bits)
    assert isinstance(layer, PackedLayer)
    layer.grow(1300)
    k, v = torch.randn(2, 1, 1200, 2, 20)
    for start, end in ((0, 1000), (1000, 1100), (1100, 1200)):
        layer.write(k[:, start:end], v[:, start:end], start)
    assert layer.base == (0 if bits == 8 else 1036)  # the latest 64 before the last hundred
    rows, weights = torch.randn(2, 3, 20), torch.rand(2, 3, 1200 - first)
    scores, mixed = layer.scores(rows, first, 1200, 0.3), layer.mix(weights, first, 1200)
    keys, values = (x[:, first:] for x in layer.whole(1200))
    assert torch.allclose(scores, rows @ keys.transpose(1, 2) * 0.3, atol=1e-4)
    assert torch.allclose(mixed, weights @ values, atol=1e-3)
    error = (keys - k[0].transpose(0, 1)[:, first:]).square().mean(-1).sqrt()
    assert error.mean() < {4: 0.12, 8: 0.008}[bits]
    assert error[:, -100:].mean() < 0.008  # recent


def _logits(folder: Path, ids: Tensor, policy: Policy, padding: list[int] | None = None) -> Tensor:
    """Prefill, then steps of one."""
    model = load_model(str(folder), device="cpu")
    cache = model.new_cache(batch=len(ids), length=64, padding=padding, policy=policy)
    parts = [ids[:, :20], *ids[:, 20:].split(1, 1)]
    return torch.stack([model.forward(part, cache) for part in parts], 1)


FAMILIES = ["llama", "mistral", "gemma2", "opt", "gpt_neox", "smollm3"]


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_stay_close(
    name: str, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "RECENT", 4)
    folder = make_model(name, torch.float32)
    ids = torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(0))
    exact = _logits(folder, ids, Policy())
    spread = exact.std()
    eight, four = (_logits(folder, ids, Policy(bits)) for bits in (8, 4))
    assert (eight - exact).square().mean().sqrt() < 0.02 * spread
    assert (four - exact).square().mean().sqrt() < 0.3 * spread


def test_padding_changes_nothing(make_model: Callable[..., Path]) -> None:
    folder = make_model("mistral", torch.float32)
    ids = torch.randint(3, 200, (1, 30), generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(ids, (7, 0))
    alone = _logits(folder, ids, Policy(8))[0, -3:]
    beside = _logits(folder, padded, Policy(8), [7])[0, -3:]
    assert (alone - beside).abs().max() < 5e-3 * alone.abs().max()


def test_memory_is_what_the_bits_say() -> None:
    sizes = {}
    for bits in (8, 4):
        (layer,) = packed_layers(1, 1, 3, 64, CPU, bits)
        layer.grow(1024)
        zero = torch.zeros(1, 1, 3, 64)
        for place in range(300):
            layer.write(zero, zero, place)
        sizes[bits] = layer.nbytes
    assert sizes[8] == 2 * 3 * 1024 * (64 + 4)
    assert sizes[4] == 2 * 3 * (1024 * (32 + 4) + 2 * RECENT * (64 + 4))


def test_cutting_back_into_old_positions_keeps_them() -> None:
    (layer,) = packed_layers(1, 1, 2, 16, CPU, 4)
    assert isinstance(layer, PackedLayer)
    layer.grow(400)
    k, v = torch.randn(2, 1, 300, 2, 16)
    for place in range(300):
        layer.write(k[:, place : place + 1], v[:, place : place + 1], place)
    base = layer.base
    assert 300 - 2 * RECENT <= base <= 300 - RECENT
    rows = torch.randn(2, 1, 16)
    before = layer.scores(rows, 0, 300, 1.0)
    layer.write(k[:, 100:101], v[:, 100:101], 100)
    assert layer.base == 100
    after = layer.scores(rows, 0, 101, 1.0)
    assert torch.equal(after[..., :100], before[..., :100])
    assert (after[..., 100] - (rows[:, 0] * k[0, 100]).sum(-1)[:, None]).abs().max() < 0.2


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_saved_comes_back(bits: int) -> None:
    (one,), (two,) = (packed_layers(1, 1, 2, 16, CPU, bits) for _ in range(2))
    one.grow(400)
    k, v = torch.randn(2, 1, 300, 2, 16)
    for place in range(300):
        one.write(k[:, place : place + 1], v[:, place : place + 1], place)
    two.restore(one.state(290))
    two.grow(400)
    rows, weights = torch.randn(2, 1, 16), torch.rand(2, 1, 290)
    assert torch.equal(one.scores(rows, 0, 290, 1.0), two.scores(rows, 0, 290, 1.0))
    assert torch.equal(one.mix(weights, 0, 290), two.mix(weights, 0, 290))
    two.write(k[:, :5], v[:, :5], 290)
    assert torch.isfinite(two.scores(rows, 0, 295, 1.0)).all()


@pytest.mark.parametrize(("bits", "kind"), [(5, "full"), (16, "h2o"), (0, "stream")])
def test_an_unknown_policy_is_refused(bits: int, kind: str) -> None:
    with pytest.raises(OptimError, match="no cache has the") as caught:
        Policy(bits, kind)
    assert caught.value.code == 2
