"""Attention of the tokens of a prompt in one C call (`attention_prompt.c`), rotation and cache too.

The reference is `optim.runtime.cache.attention.attend` after `decoder.rope.rotate`.
"""

import ctypes
from functools import cache
from typing import TypeGuard

import torch
from torch import Tensor

from optim.runtime.cache.attention import Rule, attend
from optim.runtime.cache.full import Layer, LayerCache
from optim.runtime.kernels.compile import NoKernel, library, team, works
from optim.runtime.kernels.cpu import step
from optim.runtime.kernels.door import Struct, WrongTensor, address

Angles = tuple[Tensor, Tensor]


class CPrompt(Struct):
    """`Prompt` of attention_prompt.c."""

    NAME = "Prompt"

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "tokens", "heads", "kv_heads", "dim")),
        *((name, ctypes.c_int64) for name in ("rotary", "capacity", "start", "window")),
        *((name, ctypes.c_int64) for name in ("angle_stride", "half")),
        *((name, ctypes.c_float) for name in ("scale", "cap")),
        *((name, ctypes.c_void_p) for name in ("qkv", "cos", "sin", "keys", "values")),
        *((name, ctypes.c_void_p) for name in ("padding", "out", "no_memory")),
    )


def reads(layer: Layer) -> TypeGuard[LayerCache]:
    """Whether the kernel reads this kind of cache, and works here."""
    return isinstance(layer, LayerCache) and step.reads(layer) and works(check)


def attend_prompt(
    qkv: Tensor,
    layer: LayerCache,
    start: int,
    rule: Rule,
    angles: Angles | None,
    padding: Tensor | None,
) -> Tensor:
    """Turn and store T new keys and values, and attend: `[B, T, heads * D]`.

    `qkv` fp32 contiguous `[B, T, heads + 2 kv_heads, D]`, overwritten, D a multiple of 8; `layer`
    one that `reads` knows, with room for start..start+T; `angles` cos and signed sin
    `[1 or B, T, 1, rotary]`; `padding` int64 `[B]`.
    """
    batch, tokens, _, dim = qkv.shape
    prompt = CPrompt(batch=batch, tokens=tokens, dim=dim, start=start, scale=rule.scale)
    prompt.kv_heads = layer.rows // batch
    prompt.heads = qkv.shape[2] - 2 * prompt.kv_heads
    prompt.window, prompt.cap = rule.window or 0, rule.cap or 0.0
    _check_sizes(prompt, layer)
    step.point_dense(prompt, layer, start, layer.rows, dim, tokens)
    prompt.rotary = _turns(prompt, angles)
    out = torch.empty(batch, tokens, prompt.heads * dim)
    prompt.qkv = address(qkv, torch.float32, qkv.numel())
    prompt.out = address(out, torch.float32, out.numel())
    prompt.point("padding", padding, torch.int64, batch)
    if load().optim_attend_prompt(ctypes.addressof(prompt), torch.get_num_threads(), team()):
        raise MemoryError
    return out


def _check_sizes(prompt: CPrompt, layer: LayerCache) -> None:
    whole = prompt.kv_heads > 0 and layer.rows == prompt.batch * prompt.kv_heads
    if not whole or prompt.heads <= 0 or prompt.heads % prompt.kv_heads:
        raise WrongTensor(f"{prompt.heads} query heads for {layer.rows} rows of a cache")
    if prompt.dim % step.LANES:
        raise WrongTensor(f"heads of {prompt.dim}, which is no multiple of {step.LANES}")


def _turns(prompt: CPrompt, angles: Angles | None) -> int:
    if angles is None:
        return 0
    rows, tokens, _, rotary = angles[0].shape
    if rotary % 2 or rotary > prompt.dim or rows not in (1, prompt.batch):
        raise WrongTensor(f"angles {list(angles[0].shape)} for heads of {prompt.dim}")
    for name, values in zip(("cos", "sin"), angles, strict=True):
        prompt.point(name, values, torch.float32, rows * prompt.tokens * rotary)
    prompt.angle_stride = 0 if rows == 1 else tokens * rotary
    return rotary


@cache
def load() -> ctypes.CDLL:
    """The compiled kernel. Raises NoKernel with the reason."""
    lib = library("attention_prompt", structs=(CPrompt,))
    lib.optim_attend_prompt.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    return lib


def check() -> str:
    """Compares the call with torch over fp32 and, where that is read, fp16. Raises NoKernel."""
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.float16) if step.reads_half() else (torch.float32,)
    for dtype in dtypes:
        ours, theirs = (LayerCache(False, *torch.zeros(2, 2, 160, 24, dtype=dtype)) for _ in "ab")
        rule = Rule(0.3, 50)
        for start, tokens in ((0, 70), (70, 3)):
            qkv = torch.randn(1, tokens, 10, 24, generator=generator)
            theirs.write(qkv[:, :, 6:8], qkv[:, :, 8:], start)
            wanted = attend(qkv[:, :, :6], theirs, start, rule, None)
            got = attend_prompt(qkv, ours, start, rule, None, None)
            if not float((got - wanted).abs().max()) < 1e-4:
                raise NoKernel("it does not agree with torch")
    return "rope and attention of a prompt over 16 and 32 bits"
