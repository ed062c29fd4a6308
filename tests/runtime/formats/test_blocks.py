"""GGUF's blocks: bytes there and back, values as gguf's own de-quantizer has them, good scales."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optim.runtime.formats.bits import pack_rows
from optim.runtime.formats.block_scales import (
    Scales,
    codes_of,
    cover,
    fit,
    packed_rows,
    rounded_rows,
    steps_of,
)
from optim.runtime.formats.blocks import (
    BLOCKS,
    Array,
    Blocks,
    close_blocks,
    nibble_words,
    open_blocks,
)

NAMES = sorted(BLOCKS)
names = st.sampled_from(NAMES)


def kind_of(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name.upper()]


def dequantized(raw: Array, name: str) -> Tensor:
    return torch.from_numpy(np.array(gguf.quants.dequantize(raw, kind_of(name))))


def weights(seed: int, rows: int = 6, columns: int = 512) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    loud = torch.randn(rows, columns // 32, generator=make).exp().repeat_interleave(32, 1)
    return torch.randn(rows, columns, generator=make) * loud * 0.02


def meant(q: Tensor, found: Scales, kind: Blocks) -> Tensor:
    steps = steps_of(q, found.zero[..., None], kind)
    return (steps * found.scale[..., None]).flatten(1)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_those_of_the_gguf_package(name: str) -> None:
    assert gguf.GGML_QUANT_SIZES[kind_of(name)] == (BLOCKS[name].size, BLOCKS[name].nbytes)


@given(names, st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 3))
def test_words_of_nibbles_are_the_codes_packed(
    name: str, seed: int, rows: int, blocks: int
) -> None:
    kind, random = BLOCKS[name], np.random.default_rng(seed)
    raw = random.integers(0, 256, (rows, blocks * kind.nbytes), dtype=np.uint8)
    found = nibble_words(raw, kind)
    assert (found is None) == (name not in ("q4_0", "q4_1", "q4_k", "iq4_nl"))
    if found is not None:
        codes = torch.from_numpy(open_blocks(raw, kind).codes)
        assert torch.equal(found, pack_rows(codes, 4))


@given(names, st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 3))
def test_any_bytes_come_back_and_mean_what_gguf_says(
    name: str, seed: int, rows: int, blocks: int
) -> None:
    kind, random = BLOCKS[name], np.random.default_rng(seed)
    raw = random.integers(0, 256, (rows, blocks * kind.nbytes), dtype=np.uint8)
    assert np.array_equal(close_blocks(open_blocks(raw, kind), kind), raw)
    held = open_blocks(raw, kind)
    for head in (held.d, held.m):  # any bytes may be no number
        if head is not None:
            head[:] = random.normal(size=head.shape)
    q = torch.from_numpy(held.codes).float().view(rows, -1, kind.group)
    value = steps_of(q, kind.middle, kind) * held.scale.float()[..., None]
    value = value if held.offset is None else value + held.offset.float()[..., None]
    assert torch.equal(value.flatten(1), dequantized(close_blocks(held, kind), name))


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1"])
def test_covering_scales_are_those_of_plain_rounding(name: str) -> None:
    kind, w = BLOCKS[name], weights(1)
    groups = w.view(len(w), -1, kind.group)
    low, high = groups.aminmax(dim=-1)
    found = cover(low.clamp(max=0), high.clamp(min=0), kind)
    q = codes_of(groups, found.scale[..., None], found.zero[..., None], kind)
    wanted = dequantized(gguf.quants.quantize(w.numpy(), kind_of(name)), name)
    same = (meant(q, found, kind) - wanted).abs() <= 1e-6 * w.abs().max()
    assert same.float().mean() > 0.99  # it rounds before d is in fp16, so ties differ


@pytest.mark.parametrize("name", NAMES)
def test_fitted_scales_are_stored_as_they_are_and_better(name: str) -> None:
    kind, w = BLOCKS[name], weights(2)
    groups = w.view(len(w), -1, kind.group)
    low, high = groups.aminmax(dim=-1)
    errors = []
    for found in (fit(w, kind), cover(low.clamp(max=0), high.clamp(min=0), kind)):
        q = codes_of(groups, found.scale[..., None], found.zero[..., None], kind)
        stored = dequantized(packed_rows(q.flatten(1).to(torch.uint8), found, kind), name)
        assert torch.allclose(stored, meant(q, found, kind), rtol=1e-5, atol=1e-6)
        errors.append(float((stored - w).square().sum()))
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("name", NAMES)
def test_inputs_that_count_more_are_rounded_better(name: str) -> None:
    kind, w = BLOCKS[name], weights(3, rows=40)
    groups = w.view(len(w), -1, kind.group)
    loud = torch.ones(kind.group)
    loud[::4] = 100.0
    grams = torch.diag(loud).expand(groups.shape[1], -1, -1)

    def error(found: Scales) -> float:
        q = codes_of(groups, found.scale[..., None], found.zero[..., None], kind)
        return float(((meant(q, found, kind).view(groups.shape) - groups).square() * loud).sum())

    assert error(fit(w, kind, grams)) < error(fit(w, kind))


@given(names, st.sampled_from([0.0, 1e-30, 1e-6, -3.25, 6e4, 1e30]))
def test_constant_weights(name: str, value: float) -> None:
    w = torch.full((2, 256), value)
    got = dequantized(rounded_rows(w, name), name)
    assert bool(got.isfinite().all())
    if abs(value) < 6e4:
        assert torch.allclose(got, w, rtol=0.02, atol=1e-5)
