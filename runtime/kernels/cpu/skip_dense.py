"""y = W x on a CPU where many x are zero, through `skip_dense.c`: what they multiply is not read.

Weights are held input by input, `[in, out]` in float32 or bf16; 4-bit weights: skip_int4.py.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from optim.runtime.kernels.compile import NoKernel, library, team, works
from optim.runtime.kernels.cpu.skip_int4 import NOTHING
from optim.runtime.kernels.door import Struct, WrongTensor, address
from optim.runtime.kernels.huge_pages import use_huge_pages

TILE = 64  # outputs, as in skip_dense.c
KINDS = {torch.bfloat16: 0, torch.float32: 1}


class CSparse(Struct):
    """`Sparse` of skip_dense.c."""

    NAME = "Sparse"

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("kind", "inputs", "outputs", "stride")),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class Columns:
    """A linear held input by input; `linear` makes one of a weight."""

    def __init__(self, outputs: int, weight: Tensor, bias: Tensor | None) -> None:
        """`weight` `[in, padded out]` as `layout` makes it, `bias` `[outputs]`."""
        self.inputs, self.outputs = weight.shape[0], outputs
        self.weight, self.bias = weight, None if bias is None else bias.float().contiguous()
        use_huge_pages(weight)
        self._sparse = _sparse(self.inputs, outputs, weight, self.bias)
        if weight.shape[1] != outputs + -outputs % TILE:
            raise WrongTensor(f"{outputs} outputs in columns of {weight.shape[1]}")
        self.address = ctypes.addressof(self._sparse)
        self._run, self._team = load().optim_sparse, team()
        self.used = self.calls = 0
        """Inputs that were read in so many calls."""

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def wide(self, part: slice) -> Tensor:
        """Some inputs' weights in float32: `[part, out]`."""
        return self.weight[part, : self.outputs].float()

    def __call__(self, x: Tensor, threshold: float = NOTHING) -> Tensor:
        """x float32 `[in]` -> `[out]`, without the inputs up to `threshold` in size."""
        x, y, threads = x.contiguous(), torch.empty(self.outputs), torch.get_num_threads()
        given = address(x, torch.float32, self.inputs)
        made = address(y, torch.float32, self.outputs)
        used = self._run(self.address, given, made, threshold, threads, self._team)
        if used < 0:
            raise MemoryError
        self.used += used
        self.calls += 1
        return y


class Rows:
    """A linear held row by row, of which only some rows are computed; float32 or bf16."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """`weight` contiguous `[out, in]`, `bias` `[out]`."""
        self.weight, self.bias = weight, None if bias is None else bias.float().contiguous()
        use_huge_pages(weight)
        self.outputs, self.inputs = weight.shape
        self._sparse = _sparse(self.inputs, self.outputs, weight, self.bias)
        self.address = ctypes.addressof(self._sparse)


def _sparse(inputs: int, outputs: int, weight: Tensor, bias: Tensor | None) -> CSparse:
    """`weight` lies line by line, whole."""
    made = CSparse(kind=KINDS[weight.dtype], inputs=inputs, outputs=outputs)
    made.stride = weight.shape[1] * weight.element_size()
    made.point("weight", weight, weight.dtype, weight.shape[0] * weight.shape[1])
    made.point("bias", bias, torch.float32, outputs)
    return made


def gated(up: Rows, down: Columns, x: Tensor, gate: Tensor, threshold: float) -> tuple[Tensor, int]:
    """down(gate * up(x)) without the neurons whose `gate` is up to `threshold` in size.

    x float32 `[in]`, gate float32 `[neurons]`; returns `[out]` and how many neurons were used.
    """
    x, gate, y = x.contiguous(), gate.contiguous(), torch.empty(down.outputs)
    if up.outputs != down.inputs:
        raise WrongTensor(f"{up.outputs} neurons go up, {down.inputs} down")
    pointers = (
        address(x, torch.float32, up.inputs),
        address(gate, torch.float32, down.inputs),
        address(y, torch.float32, down.outputs),
    )
    threads = torch.get_num_threads()
    used = load().optim_gated(up.address, down.address, *pointers, threshold, threads, team())
    if used < 0:
        raise MemoryError
    return y, used


def linear(weight: Tensor, bias: Tensor | None) -> Columns:
    """Columns of a dense `[out, in]` weight in float32 or bf16."""
    return Columns(weight.shape[0], layout(weight), bias)


def layout(weight: Tensor) -> Tensor:
    """`[out, in]` -> `[in, out]`, padded to whole tiles of outputs."""
    return torch.nn.functional.pad(weight.T, (0, -weight.shape[0] % TILE)).contiguous()


@cache
def load() -> ctypes.CDLL:
    """The compiled kernel. Raises NoKernel with the reason."""
    lib = library("skip_dense", structs=(CSparse,))
    pointer = ctypes.c_void_p
    lib.optim_sparse.argtypes = [*[pointer] * 3, ctypes.c_float, ctypes.c_int, pointer]
    lib.optim_sparse.restype = ctypes.c_int64
    lib.optim_gated.argtypes = [*[pointer] * 5, ctypes.c_float, ctypes.c_int, pointer]
    lib.optim_gated.restype = ctypes.c_int64
    return lib


def reads(weight: Tensor) -> bool:
    """Whether the kernel can be used for a dense weight."""
    return weight.device.type == "cpu" and weight.dtype in KINDS and usable()


def usable() -> bool:
    """Whether the kernel can be built here and agrees with torch."""
    return works(check)


@cache
def check() -> str:
    """Compares the kernel with torch on odd shapes. Raises NoKernel."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(133, generator=generator), torch.randn(71, 133, generator=generator)
    kept = torch.where(x.abs() > 0.5, x, 0)
    for dtype in KINDS:
        held = weight.to(dtype)
        wanted = held.double() @ kept.double()
        _agree(linear(held, None)(x, 0.5), wanted)
        gate = torch.relu(torch.randn(71, generator=generator))
        got, _ = gated(Rows(held, None), linear(held.T, None), x, gate, 0.0)
        _agree(got, held.double().T @ (gate.double() * (held.double() @ x.double())))
    return "skips columns"


def _agree(got: Tensor, wanted: Tensor) -> None:
    error = float((got - wanted).abs().max() / wanted.abs().max())
    if not error < 1e-5:
        raise NoKernel(f"it disagrees with torch by {error:.1e}")
