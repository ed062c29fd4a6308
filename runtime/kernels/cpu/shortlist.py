"""The largest outputs of a bf16 head, exactly, for half the bytes, through `shortlist.c`.

A copy of the head in 8 bits says within which interval each output lies. Only rows whose interval
reaches the largest ones are read, and what they give is `bf16.linear`'s, or `bf12.linear`'s, in
every bit. How the intervals are known stands in the C file.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from optim.runtime.kernels import huge_pages
from optim.runtime.kernels.compile import NoKernel, library, team, works
from optim.runtime.kernels.cpu import bf16, w4a8
from optim.runtime.kernels.cpu.bf12 import CPlanes
from optim.runtime.kernels.cpu.decode import SOURCES
from optim.runtime.kernels.cpu.dense import CDense, Dense
from optim.runtime.kernels.door import Struct, address

MOST = 256  # beyond, the intervals of too many rows reach the largest
SHARED = 64  # inputs with one scale


class CShortlist(Struct):
    """`Shortlist` of shortlist.c."""

    NAME = "Shortlist"

    _fields_ = (
        ("codes", w4a8.CLinear),
        *((name, ctypes.c_void_p) for name in ("dense", "size", "apart")),
    )


class Shortlist:
    """A head of bf16 weights `[out, in]`, as they are or in planes, without a bias.

    `tokens` counts those it was asked about.
    """

    def __init__(self, dense: Dense) -> None:
        """Makes the copy. Raises NoKernel where the C code cannot be built."""
        lib, rows, chunks = load(), w4a8.load().optim_rows(), -(-dense.inputs // SHARED)
        self.outputs, self.inputs = dense.outputs, dense.inputs
        blocks = -(-self.outputs // rows)
        self._run, self._team, self._dense = lib.optim_shortlist, team(), dense
        self._codes = huge_pages.empty((blocks, chunks * SHARED // 4, rows), torch.int32)
        self._scale = huge_pages.empty((blocks, chunks, rows), torch.bfloat16)
        self._codes[-1], self._scale[-1] = 0, 0
        self._lengths = torch.empty(2, self.outputs)
        self._c = CShortlist(dense=dense.address)
        self._c.point("size", self._lengths[0], torch.float32, self.outputs)
        self._c.point("apart", self._lengths[1], torch.float32, self.outputs)
        self._c.codes = w4a8.CLinear(
            inputs=self.inputs,
            outputs=self.outputs,
            bits=8,
            chunk=SHARED,
            chunks=chunks,
            scales=chunks,
            scale_type=w4a8.SCALES.index(torch.bfloat16),
            middle=128,
        )
        codes = self._c.codes
        codes.weight = address(self._codes, torch.int32, self._codes.numel())
        codes.scale = address(self._scale, torch.bfloat16, self._scale.numel())
        self._read = self.tokens = 0
        self.address = ctypes.addressof(self._c)
        lib.optim_shortlist_make(self.address, torch.get_num_threads(), self._team)

    @property
    def nbytes(self) -> int:
        """Bytes of the copy, which a token reads."""
        return sum(held.nbytes for held in (self._codes, self._scale, self._lengths))

    @property
    def rows_read(self) -> float:
        """How many rows of the head a token has read beside it, on average."""
        return self._read / max(self.tokens, 1)

    def __call__(self, x: Tensor, best: int) -> Tensor:
        """x W^T of fp32 `[tokens, in]`: `[tokens, out]`, of each token at least the `best` largest.

        1 <= `best` <= MOST. Outputs that are certainly smaller may be minus infinity.
        """
        assert 1 <= best <= MOST
        x, tokens = x.contiguous(), x.shape[0]
        y = torch.empty(tokens, self.outputs)
        given = address(x, torch.float32, tokens * self.inputs)
        made = address(y, torch.float32, tokens * self.outputs)
        threads = torch.get_num_threads()
        read = self._run(self.address, given, made, tokens, best, threads, self._team)
        if read < 0:
            raise MemoryError
        self._read, self.tokens = self._read + read, self.tokens + tokens
        return y


@cache
def load() -> ctypes.CDLL:
    """The compiled kernel. Raises NoKernel with the reason."""
    lib = library(*SOURCES, structs=(CShortlist, w4a8.CLinear, CDense, CPlanes))
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    lib.optim_shortlist_make.argtypes = [pointer, ctypes.c_int, pointer]
    lib.optim_shortlist_make.restype = None
    lib.optim_shortlist.argtypes = [*[pointer] * 3, integer, integer, ctypes.c_int, pointer]
    lib.optim_shortlist.restype = integer
    return lib


def usable() -> bool:
    """Whether a `Shortlist` works here."""
    return works(check)


@cache
def check() -> str:
    """Compares the largest outputs with those of `bf16.linear`. Raises NoKernel."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1071, 133, generator=generator).to(torch.bfloat16)
    x = torch.randn(3, 133, generator=generator)
    got = Shortlist(Dense(weight, None))(x, 5)
    if not torch.equal(got.topk(5).values, bf16.linear(x, weight).topk(5).values):
        raise NoKernel("it disagrees with the bf16 kernel")
    return "compiled here"
