"""Integers in GGUF blocks: what gguf's own reader makes of them is what they stand for."""

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st

from optim.export.gguf.blocks import carried, carrier, moved, rounded, row_bytes
from optim.export.gguf.layout import turn
from optim.runtime.formats.pack_quantized import Scheme, dequantize
from optim.runtime.storage.gguf.store import deinterleave

SCHEMES = [
    Scheme(bits, group, sym)
    for bits in (2, 3, 4, 8)
    for group in (32, 64, 128, -1)
    for sym in (True, False)
    if sym or bits < 8
]


def weights(
    scheme: Scheme, seed: int, outputs: int = 8, inputs: int = 256
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Random integers, bf16 scales and zero points."""
    make = torch.Generator().manual_seed(seed)
    most = 1 << scheme.bits
    q = torch.randint(0, most, (outputs, inputs), generator=make, dtype=torch.uint8)
    groups = scheme.groups(inputs)
    scale = (torch.rand(outputs, groups, generator=make) * 0.02 + 1e-4).bfloat16()
    zero = torch.randint(0, most, (outputs, groups), generator=make, dtype=torch.uint8)
    return q, scale, None if scheme.symmetric else zero


@given(st.sampled_from(SCHEMES), st.integers(0, 2**31))
def test_carried_integers_read_back(scheme: Scheme, seed: int) -> None:
    q, scale, zero = weights(scheme, seed)
    kind = carrier(scheme, q.shape[1])
    assert kind is not None
    blocks = carried(q, scale, zero, scheme)
    assert blocks.shape == (q.shape[0], row_bytes(kind, q.shape[1]))
    read = torch.from_numpy(gguf.quants.dequantize(blocks, kind)).double()
    meant = dequantize(q, scale, zero, scheme).double()
    said = moved(scale, zero, scheme)
    assert said is not None
    if zero is None:
        assert torch.equal(read, meant) and str(said) == ""
        return
    steps = scale.double().repeat_interleave(q.shape[1] // scale.shape[1], 1)
    off = ((read - meant).abs() / steps).max()
    assert off <= said.steps + 1e-6 and said.steps <= 0.0074  # exports.md: 2^-11 of z s


def test_offsets_are_minima() -> None:
    scheme = Scheme(4, 32, symmetric=False, offset=True)
    q, scale, _ = weights(scheme, 0)
    offset = (torch.randn(scale.shape, generator=torch.Generator().manual_seed(1)) / 9).half()
    said = moved(scale, offset, scheme)
    assert said is not None and said.steps == 0
    kind = carrier(scheme, q.shape[1])
    assert kind == Kind.Q4_1
    read = torch.from_numpy(gguf.quants.dequantize(carried(q, scale, offset, scheme), kind))
    assert torch.equal(read, dequantize(q, scale, offset, scheme))


def test_what_no_block_holds() -> None:
    assert carrier(Scheme(8, 64, False), 256) is None
    assert carrier(Scheme(4, 16, True), 256) is None
    assert carrier(Scheme(4, -1, True), 48) is None
    assert carrier(None, 256) is None
    assert carrier(Scheme(5, 32, True), 256) is None
    assert carrier(Scheme(6, 32, False, offset=True), 256) is None


def test_scales_that_fp16_does_not_hold() -> None:
    scheme = Scheme(4, 32, True)
    assert moved(torch.tensor([[70000.0]]), None, scheme) is None
    assert moved(torch.tensor([[1e-9]]), None, scheme) is None
    small = moved(torch.tensor([[2.0**-17 * 1.0078125]], dtype=torch.bfloat16), None, scheme)
    assert small is not None and small.steps == 0
    smaller = moved(torch.tensor([[2.0**-20 * 1.0078125]], dtype=torch.bfloat16), None, scheme)
    assert smaller is not None and 0 < smaller.steps < 8 and "of a step" in str(smaller)
    nothing = moved(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.uint8), Scheme(4, 32, False))
    assert nothing is not None and nothing.steps == 0


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q5_1])
def test_rounded_floats_read_back(kind: Kind) -> None:
    w = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    blocks = rounded(w, kind)
    assert blocks.shape == (6, row_bytes(kind, 64))
    read = torch.from_numpy(gguf.quants.dequantize(blocks, kind).copy())
    bound = {Kind.F32: 0, Kind.F16: 2e-3, Kind.BF16: 1.6e-2, Kind.Q8_0: 0.02, Kind.Q5_1: 0.1}
    assert float((read - w).abs().max()) <= bound.get(kind, 0.3)
    if kind == Kind.BF16:
        assert torch.equal(read, w.bfloat16().float())


@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 3))
def test_turning_is_undone_by_the_reader(heads: int, half: int, columns: int) -> None:
    w = torch.randn(heads * half * 2, columns)
    assert torch.equal(deinterleave(turn(w, heads), heads), w)
    assert torch.equal(turn(w[:, 0], heads), turn(w, heads)[:, 0])
