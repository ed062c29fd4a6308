"""Plain bf16 weights on a CPU for few tokens, through `bf16.c`: an untouched output head.

torch multiplies bf16 fast only where the CPU has bf16 units, and float32 costs twice the memory.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from optim.runtime.kernels.compile import NoKernel, library, team, works
from optim.runtime.kernels.door import address

FEW_TOKENS = 16  # beyond, widening the weight once and a dense product is faster


def usable() -> bool:
    """Whether `linear` works here."""
    return works(check)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T: float32 `[tokens, in]`, contiguous bf16 `[out, in]` -> float32 `[tokens, out]`."""
    x = x.contiguous()
    tokens, (outputs, inputs) = x.shape[0], weight.shape
    y = torch.empty(tokens, outputs)
    run, threads = load().optim_bf16, torch.get_num_threads()
    pointers = (
        address(weight, torch.bfloat16, outputs * inputs),
        address(x, torch.float32, tokens * inputs),
        address(y, torch.float32, tokens * outputs),
    )
    if run(*pointers, outputs, inputs, tokens, threads, team()):
        raise MemoryError
    return y


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """What `linear` computes, in float64."""
    return x.double() @ weight.double().T


@cache
def load() -> ctypes.CDLL:
    """The compiled kernel. Raises NoKernel with the reason."""
    lib = library("bf16")
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    lib.optim_bf16.argtypes = [*[pointer] * 3, *[integer] * 3, ctypes.c_int, pointer]
    return lib


@cache
def check() -> str:
    """Compares the kernel with `reference` on an odd shape. Raises NoKernel."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(71, 133, generator=generator).to(torch.bfloat16)
    x = torch.randn(3, 133, generator=generator)
    wanted = reference(x, weight)
    error = float((linear(x, weight) - wanted).abs().max() / wanted.abs().max())
    if not error < 1e-5:
        raise NoKernel(f"it disagrees with the reference by {error:.1e}")
    return "compiled here"
