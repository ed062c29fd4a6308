"""GGUF's blocks of 32 weights: integers carried into them as they are, floats rounded to them.

    Q4_0  d, 16 bytes: w = (q - 8) d           d, m: fp16; byte j holds q[j] and q[j + 16]
    Q4_1  d, m, 16 bytes: w = q d + m
    Q8_0  d, 32 int8: w = q d

A group of 64 or 128 weights becomes blocks that repeat its scale. Layouts: ggml's ggml-common.h.
"""

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from optim.export.exporter import Moved
from optim.runtime.formats.block_scales import rounded_rows
from optim.runtime.formats.schemes import Scheme

BLOCK = 32
CHUNK = 1 << 22  # weights that are rounded at a time
KINDS = {
    "f32": Kind.F32,
    "f16": Kind.F16,
    "bf16": Kind.BF16,
    "q8_0": Kind.Q8_0,
    "q4_0": Kind.Q4_0,
    "q4_1": Kind.Q4_1,
    "q5_0": Kind.Q5_0,
    "q5_1": Kind.Q5_1,
    "iq4_nl": Kind.IQ4_NL,
    "q2_k": Kind.Q2_K,
    "q3_k": Kind.Q3_K,
    "q4_k": Kind.Q4_K,
    "q5_k": Kind.Q5_K,
    "q6_k": Kind.Q6_K,
}
FITTED = ("iq4_nl", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")


def row_bytes(kind: Kind, inputs: int) -> int:
    """Bytes of a row of `inputs` weights."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return inputs // block * size


def carrier(scheme: Scheme | None, inputs: int) -> Kind | None:
    """The blocks that hold a scheme's integers; None where no kind of block does."""
    if scheme is None or inputs % BLOCK:
        return None
    if scheme.group_size > 0 and scheme.group_size % BLOCK:
        return None
    if scheme.bits == 8:
        return Kind.Q8_0 if scheme.symmetric else None
    if scheme.bits > 4:
        return None
    return Kind.Q4_0 if scheme.symmetric else Kind.Q4_1


def moved(scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Moved | None:
    """What fp16 does to a grid; None where a scale is too large for it, or vanishes.

    scale `[out, groups]`, zero uint8 `[out, groups]`, an offset, or None; see pack_quantized.
    """
    exact = scale.double()
    d = scale.to(torch.float16).double()
    if not bool(d.isfinite().all()) or bool(((d == 0) & (exact != 0)).any()):
        return None
    most = 1 << (scheme.bits - 1) if zero is None else (1 << scheme.bits) - 1
    off = (d - exact).abs() * most
    if zero is not None:
        m = _minimum(scale, zero, scheme)
        if not bool(m.isfinite().all()):
            return None
        meant = zero.double() if scheme.offset else -zero.double() * exact
        off = off + (m.double() - meant).abs()
    steps = torch.where(exact == 0, 0.0, off / exact.abs())
    return Moved(float(steps.max()), float((steps > 0).double().mean()))


def carried(q: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> np.ndarray:
    """Integers `q` uint8 `[out, in]` in blocks: uint8 `[out, bytes of a row]`."""
    outputs, inputs = q.shape
    blocks = q.numpy().reshape(outputs, inputs // BLOCK, BLOCK)
    heads = [_repeated(scale.to(torch.float16), inputs)]
    if scheme.bits == 8:
        body = blocks ^ 0x80  # q - 128 as int8
    else:
        shift = 8 - (1 << (scheme.bits - 1)) if zero is None else 0
        blocks = blocks + np.uint8(shift)
        body = blocks[..., :16] | blocks[..., 16:] << 4
    if zero is not None:
        heads.append(_repeated(_minimum(scale, zero, scheme), inputs))
    return np.concatenate([*heads, body], -1).reshape(outputs, -1)


def rounded(w: Tensor, kind: Kind) -> np.ndarray:
    """Floats `[rows, in]` in blocks: uint8 `[rows, bytes of a row]`.

    Rounded as llama.cpp does without an importance matrix, or where `gguf` has no packer (IQ4_NL, K
    types) with the scales that fit them best.
    """
    step = max(1, CHUNK // w.shape[-1])
    parts = [_rounded(rows, kind) for rows in torch.split(w, step)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _rounded(w: Tensor, kind: Kind) -> np.ndarray:
    if kind == Kind.BF16:
        made = w.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    elif kind in (Kind.F16, Kind.F32):
        made = w.to(torch.float16 if kind == Kind.F16 else torch.float32).numpy().view(np.uint8)
    elif (name := kind.name.lower()) in FITTED:
        made = rounded_rows(w, name)
    else:
        made = gguf.quants.quantize(w.float().contiguous().numpy(), kind)
    return np.ascontiguousarray(made)


def _minimum(scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """What a block adds: the offset itself, or what the zero point takes away; fp16."""
    if scheme.offset:
        return zero.to(torch.float16)
    return (-zero.float() * scale.float()).to(torch.float16)


def _repeated(values: Tensor, inputs: int) -> np.ndarray:
    """fp16 `[out, groups]` as the bytes `[out, blocks, 2]` of each block's own."""
    outputs, groups = values.shape
    each = np.repeat(values.numpy(), inputs // BLOCK // groups, axis=1)
    return each.view(np.uint8).reshape(outputs, inputs // BLOCK, 2)
