"""Nibbles times codes on a CPU through `static_int.c`: exact integers, as the reference's."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from optim.runtime.formats.static_int import accumulate, pack_nibbles
from optim.runtime.kernels.compile import NoKernel, library, team, works
from optim.runtime.kernels.door import address


@cache
def load() -> ctypes.CDLL:
    """The compiled kernel. Raises NoKernel with the reason."""
    lib = library("static_int")
    places, counts = [ctypes.c_void_p] * 4, [ctypes.c_int64] * 3
    lib.optim_static.argtypes = [*places, *counts, ctypes.c_int, ctypes.c_void_p]
    lib.optim_static.restype = None
    lib.optim_static_name.restype = ctypes.c_char_p
    return lib


def product(codes: Tensor, packed: Tensor) -> Tensor:
    """int8 codes `[M, K]`, nibbles uint8 `[N, K/2]` -> sum_k (u - 8) code, float32 `[M, N]`."""
    codes = codes.contiguous()
    sums = codes.sum(1, dtype=torch.int32)
    tokens, (outputs, half) = codes.shape[0], packed.shape
    out = torch.empty(tokens, outputs)
    load().optim_static(
        address(packed, torch.uint8, outputs * half),
        address(codes, torch.int8, tokens * 2 * half),
        address(sums, torch.int32, tokens),
        address(out, torch.float32, tokens * outputs),
        tokens,
        outputs,
        half,
        torch.get_num_threads(),
        team(),
    )
    return out


def usable() -> bool:
    """Whether the kernel can be used here."""
    return works(check)


@cache
def check() -> str:
    """Compares the kernel with exact integers; the instructions it uses. Raises NoKernel."""
    name = str(load().optim_static_name().decode())
    generator = torch.Generator().manual_seed(0)
    for tokens, outputs, inputs in ((1, 70, 64), (3, 5, 130), (6, 65, 1536)):
        codes = torch.randint(-128, 128, (tokens, inputs), generator=generator).to(torch.int8)
        codes[0] = -128
        u = torch.randint(0, 16, (outputs, inputs), generator=generator, dtype=torch.uint8)
        u[0] = 15
        if not torch.equal(product(codes, pack_nibbles(u)), accumulate(codes, u).float()):
            raise NoKernel(f"{name} is not exact")
    return f"{name}; static integers; 4-bit AWQ (w4a8) decodes faster here"
