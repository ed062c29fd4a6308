"""The stored layout: our bits are compressed-tensors' bits, and damage is named."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optim.recipes.errors import OptimError
from optim.runtime.formats.bits import pack_rows, unpack_rows
from optim.runtime.formats.pack_quantized import Scheme, dequantize, pack, unpack

BITS = (2, 3, 4, 8)


def random_linear(
    scheme: Scheme, outputs: int, inputs: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    top, groups = 1 << scheme.bits, scheme.groups(inputs)
    q = torch.randint(0, top, (outputs, inputs), generator=generator, dtype=torch.uint8)
    scale = torch.rand(outputs, groups, generator=generator).add_(0.01).to(dtype)
    zero = torch.randint(0, top, (outputs, groups), generator=generator, dtype=torch.uint8)
    return q, scale, None if scheme.symmetric else zero


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "count"), [(1, 1), (3, 7), (5, 31), (2, 33), (9, 96), (4, 100)])
def test_words_are_those_of_compressed_tensors(bits: int, rows: int, count: int) -> None:
    values = torch.randint(0, 1 << bits, (rows, count), dtype=torch.uint8)
    signed = (values.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    theirs = pack_to_int32(signed, bits)
    assert torch.equal(pack_rows(values, bits), theirs)
    assert torch.equal(unpack_from_int32(pack_rows(values, bits), bits, signed.shape), signed)


@given(st.sampled_from(BITS), st.integers(1, 20), st.integers(1, 130), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_rows_round_trip(bits: int, rows: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 1 << bits, (rows, count), generator=generator, dtype=torch.uint8)
    assert torch.equal(unpack_rows(pack_rows(values, bits), bits, count), values)


@given(
    bits=st.sampled_from(BITS),
    symmetric=st.booleans(),
    group=st.sampled_from((-1, 16, 24, 32, 64)),
    outputs=st.integers(1, 40),
    groups=st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_linears_round_trip(
    bits: int, symmetric: bool, group: int, outputs: int, groups: int
) -> None:
    scheme = Scheme(bits, group, symmetric)
    q, scale, zero = random_linear(scheme, outputs, groups * abs(group) + (group < 0) * 7)
    back = unpack(pack(q, scale, zero, scheme), scheme)
    assert torch.equal(back[0], q)
    assert torch.equal(back[1], scale)
    assert (back[2] is None) == symmetric
    if zero is not None and back[2] is not None:
        assert torch.equal(back[2], zero)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [-1, 32])
def test_compressed_tensors_reads_the_same_weight(bits: int, symmetric: bool, group: int) -> None:
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = Scheme(bits, group, symmetric)
    q, scale, zero = random_linear(scheme, 19, 96)
    arguments = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="group" if group > 0 else "channel",
        group_size=group if group > 0 else None,
    )
    theirs = PackedQuantizationCompressor.decompress(
        pack(q, scale, zero, scheme), QuantizationScheme(targets=["Linear"], weights=arguments)
    )
    ours = dequantize(q, scale, zero, scheme, torch.bfloat16)
    assert torch.equal(theirs["weight"], ours)


def test_dequantize_is_the_formula() -> None:
    scheme = Scheme(3, 2, False)
    q = torch.tensor([[0, 7, 3, 4]], dtype=torch.uint8)
    zero = torch.tensor([[1, 4]], dtype=torch.uint8)
    weight = dequantize(q, torch.tensor([[0.5, 2.0]]), zero, scheme)
    assert weight.tolist() == [[-0.5, 3.0, -2.0, 0.0]]


@pytest.mark.parametrize(
    ("key", "damage"),
    [
        ("weight_packed", lambda t: t[:, :-1]),
        ("weight_packed", lambda t: t.to(torch.int64)),
        ("weight_scale", lambda t: t[:-1]),
        ("weight_scale", lambda t: t.to(torch.int32)),
        ("weight_scale", lambda t: torch.full_like(t, torch.nan)),
        ("weight_zero_point", lambda t: t[:-1]),
        ("weight_zero_point", lambda t: t.to(torch.uint8)),
        ("weight_shape", lambda t: t[:1]),
        ("weight_shape", lambda t: -t),
        ("weight_shape", lambda t: t.float()),
    ],
)
def test_damage_is_named(key: str, damage) -> None:  # type: ignore[no-untyped-def]
    scheme = Scheme(4, 32, False)
    tensors = pack(*random_linear(scheme, 16, 64), scheme)
    tensors[key] = damage(tensors[key])
    with pytest.raises(OptimError, match=f"layer.7.{key}"):
        unpack(tensors, scheme, "layer.7")


@pytest.mark.parametrize(
    "key", ["weight_packed", "weight_scale", "weight_zero_point", "weight_shape"]
)
def test_missing_tensor_is_named(key: str) -> None:
    scheme = Scheme(4, 32, False)
    tensors = pack(*random_linear(scheme, 16, 64), scheme)
    del tensors[key]
    with pytest.raises(OptimError, match=f"{key}.*missing"):
        unpack(tensors, scheme)


def test_values_that_do_not_fit_are_refused() -> None:
    scheme = Scheme(3, 32, True)
    q, scale, _ = random_linear(scheme, 4, 64)
    with pytest.raises(OptimError, match="9 does not fit in 3 bits"):
        pack(torch.full_like(q, 9), scale, None, scheme)
    with pytest.raises(OptimError, match="zero"):
        pack(q, scale, torch.zeros(4, 2, dtype=torch.uint8), scheme)
    with pytest.raises(OptimError, match="does not divide"):
        pack(q[:, :63], scale, None, scheme)
    with pytest.raises(OptimError, match="bits"):
        Scheme(7, 32, True)
