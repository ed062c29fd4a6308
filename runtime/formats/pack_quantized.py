"""compressed-tensors `pack-quantized`: integer weights of 2, 3, 4 or 8 bits with scales.

    w[o, i] = (q[o, i] - zero[o, i // g]) * scale[o, i // g]        symmetric: zero = 2^(bits-1)

    weight_packed      int32 [out, ceil(in*bits/32)]      q, dense along the inputs (`bits.py`)
    weight_scale       float [out, in/g]                  in the model's dtype
    weight_zero_point  int32 [ceil(out*bits/32), in/g]    only asymmetric, dense along the outputs
    weight_shape       int64 [2]                          out, in

What comes from formats of others may have `weight_offset`, like the scales, in place of zero
points: w = q * scale + offset. It is never stored so.

The format calls values signed (q - 2^(bits-1)) and stores them with that offset: unsigned, as here.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.formats.bits import pack_rows, unpack_rows, words
from optim.runtime.formats.schemes import Scheme, SchemeOf, parse_config, write_config

__all__ = ["Scheme", "SchemeOf", "dequantize", "pack", "parse_config", "unpack", "write_config"]

SUFFIXES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_offset", "weight_shape")


def pack(q: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of one linear as they are stored.

    q: uint8 [out, in], below 2^bits. scale: float [out, groups], kept in its dtype.
    zero: uint8 [out, groups] below 2^bits, None if symmetric; floats like `scale` for an offset.
    Raises OptimError if a shape, dtype or value is not one the scheme can hold.
    """
    outputs, inputs = q.shape
    groups = scheme.groups(inputs)
    _expect("q", q, (torch.uint8,), (outputs, inputs))
    _expect_scale("scale", scale, (outputs, groups))
    if (zero is None) != scheme.symmetric:
        raise _corrupt("zero", f"a {scheme} weight has {'no' if scheme.symmetric else 'a'} zero")
    _expect_below("q", q, scheme.bits)
    tensors = {
        "weight_packed": pack_rows(q, scheme.bits),
        "weight_scale": scale.contiguous(),
        "weight_shape": torch.tensor([outputs, inputs], dtype=torch.int64),
    }
    if zero is not None and scheme.offset:
        _expect_scale("offset", zero, (outputs, groups))
        tensors["weight_offset"] = zero.contiguous()
    elif zero is not None:
        _expect("zero", zero, (torch.uint8,), (outputs, groups))
        _expect_below("zero", zero, scheme.bits)
        tensors["weight_zero_point"] = pack_rows(zero.T, scheme.bits).T.contiguous()
    return tensors


def unpack(
    tensors: Mapping[str, Tensor], scheme: Scheme, name: str = "weight"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of `pack`: (q uint8 [out, in], scale [out, groups], zero or None).

    `tensors` has the keys of `pack`. `name` is the module, for messages.
    Raises OptimError naming the tensor if one is missing or corrupt.
    """
    packed, scale, zero = still_packed(tensors, scheme, name)
    return unpack_rows(packed, scheme.bits, _shape(tensors, name)[1]), scale, zero


def still_packed(
    tensors: Mapping[str, Tensor], scheme: Scheme, name: str = "weight"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `unpack`, with the integers in their words: int32 [out, ceil(in*bits/32)]."""
    outputs, inputs = _shape(tensors, name)
    packed_shape = (outputs, words(inputs, scheme.bits))
    packed = _get(tensors, "weight_packed", name)
    _expect(f"{name}.weight_packed", packed, (torch.int32,), packed_shape)
    groups = scheme.groups(inputs)
    scale = _get(tensors, "weight_scale", name)
    _expect_scale(f"{name}.weight_scale", scale, (outputs, groups))
    zero = None
    if scheme.offset:
        zero = _get(tensors, "weight_offset", name)
        _expect_scale(f"{name}.weight_offset", zero, (outputs, groups))
    elif not scheme.symmetric:
        stored = _get(tensors, "weight_zero_point", name)
        zero_shape = (words(outputs, scheme.bits), groups)
        _expect(f"{name}.weight_zero_point", stored, (torch.int32,), zero_shape)
        zero = unpack_rows(stored.T, scheme.bits, outputs).T.contiguous()
    return packed, scale, zero


def dequantize(
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    scheme: Scheme,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight [out, in] in `dtype`: computed exactly in float32, then rounded once.

    Shapes as in `pack`; `zero` None stands for 2^(bits-1).
    """
    return exact(q, scale.to(torch.float32), zero, scheme).to(dtype)


def exact(q: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """The weight [out, in], computed in the dtype of `scale`."""
    weight = q.to(scale.dtype).view(q.shape[0], scale.shape[1], -1)
    shift = None if zero is None else zero.to(scale.dtype).unsqueeze(-1)
    if not scheme.offset:
        weight -= 2.0 ** (scheme.bits - 1) if shift is None else shift
    weight *= scale.unsqueeze(-1)
    if scheme.offset and shift is not None:
        weight += shift
    return weight.view(q.shape)


def _get(tensors: Mapping[str, Tensor], key: str, name: str) -> Tensor:
    if key not in tensors:
        raise _corrupt(f"{name}.{key}", "it is missing")
    return tensors[key]


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    stored = _get(tensors, "weight_shape", name)
    if stored.dtype not in (torch.int32, torch.int64) or stored.shape != (2,):
        raise _corrupt(f"{name}.weight_shape", f"{_describe(stored)} is not two integers")
    outputs, inputs = (int(n) for n in stored)
    if min(outputs, inputs) < 1:
        raise _corrupt(f"{name}.weight_shape", f"[{outputs}, {inputs}] is not a shape")
    return outputs, inputs


def _expect(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]
) -> None:
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        wanted = f"{str(dtypes[-1]).removeprefix('torch.')} {list(shape)}"
        raise _corrupt(name, f"{_describe(tensor)} where {wanted} is expected")


def _expect_scale(name: str, scale: Tensor, shape: tuple[int, int]) -> None:
    _expect(name, scale, (torch.float16, torch.bfloat16, torch.float32), shape)
    if not scale.isfinite().all():
        raise _corrupt(name, "it has values that are not finite")


def _expect_below(name: str, values: Tensor, bits: int) -> None:
    if values.numel() and int(values.max()) >= 1 << bits:
        raise _corrupt(name, f"{int(values.max())} does not fit in {bits} bits")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _corrupt(name: str, reason: str) -> OptimError:
    return OptimError(f"{name} cannot be used: {reason}", "is the checkpoint complete?", USAGE)
