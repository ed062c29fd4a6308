"""y = W x on a CPU where many x are zero, through `cpu_sparse.c`: what they multiply is not read.

Weights are held input by input: `[in, out]` in float32 or bf16, or two outputs a byte in int4.

int4 activations are rounded to int8 as in cpu_w4a8.py, which makes threshold 0 the same sum.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from optim.runtime.formats.schemes import Scheme
from optim.runtime.kernels import cpu_w4a8
from optim.runtime.kernels.native import NoKernel, library, team
from optim.runtime.machine import use_huge_pages

TILE = 64  # outputs, as in cpu_sparse.c
KINDS = {torch.bfloat16: 0, torch.float32: 1}
INT4 = 4
NOTHING = -1.0  # a threshold that skips nothing, not even zeros


class _Sparse(ctypes.Structure):
    """`Sparse` of cpu_sparse.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("kind", "inputs", "outputs", "stride")),
        ("weight", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("group", "chunk")),
        *((name, ctypes.c_void_p) for name in ("scale", "zero", "group_of")),
        ("groups", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
    )


class Columns:
    """A linear held input by input; `linear` makes one of a dense weight, `packed` of int4."""

    def __init__(self, outputs: int, fields: dict[str, int], tensors: dict[str, Tensor]) -> None:
        self.inputs, self.outputs = tensors["weight"].shape[0], outputs
        self.fields, self.tensors = fields, tensors
        use_huge_pages(tensors["weight"])
        pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        stride = tensors["weight"].stride(0) * tensors["weight"].element_size()
        self._sparse = _Sparse(
            inputs=self.inputs, outputs=outputs, stride=stride, **fields, **pointers
        )
        self.address = ctypes.addressof(self._sparse)
        self._run, self._team = load().optim_sparse, team()
        self.used = 0

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def wide(self, part: slice) -> Tensor:
        """Some inputs' weights in float32: `[part, out]`."""
        weight = self.tensors["weight"][part]
        if self._sparse.kind != INT4:
            return weight[:, : self.outputs].float()
        tiles = weight.view(len(weight), -1, 1, TILE // 2)
        q = torch.cat((tiles & 15, tiles >> 4), 2).flatten(1)[:, : self.outputs].float()
        inputs = torch.arange(self.inputs, dtype=torch.int32)[part]
        group = torch.searchsorted(self.tensors["group_of"][1:], inputs, right=True)
        zero = self._of_groups("zero", group) if "zero" in self.tensors else 8.0
        return (q - zero) * self._of_groups("scale", group)

    def _of_groups(self, name: str, group: Tensor) -> Tensor:
        return self.tensors[name][:, : self.outputs].float()[group]

    def __call__(self, x: Tensor, threshold: float = NOTHING) -> Tensor:
        """x float32 `[in]` -> `[out]`, without the inputs up to `threshold` in size.

        How many inputs were used is in `used`.
        """
        x = x.contiguous()
        y = torch.empty(self.outputs)
        threads = torch.get_num_threads()
        used = self._run(self.address, x.data_ptr(), y.data_ptr(), threshold, threads, self._team)
        if used < 0:
            raise MemoryError
        self.used = used
        return y


class Rows:
    """A linear held row by row, of which only some rows are computed; float32 or bf16."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """`weight` contiguous `[out, in]`, `bias` `[out]`."""
        self.weight, self.bias = weight, None if bias is None else bias.float().contiguous()
        use_huge_pages(weight)
        self._sparse = _Sparse(
            kind=KINDS[weight.dtype],
            inputs=weight.shape[1],
            outputs=weight.shape[0],
            stride=weight.stride(0) * weight.element_size(),
            weight=weight.data_ptr(),
            bias=None if self.bias is None else self.bias.data_ptr(),
        )
        self.address = ctypes.addressof(self._sparse)


def gated(up: Rows, down: Columns, x: Tensor, gate: Tensor, threshold: float) -> tuple[Tensor, int]:
    """down(gate * up(x)) without the neurons whose `gate` is up to `threshold` in size.

    x float32 `[in]`, gate float32 `[neurons]`; returns `[out]` and how many neurons were used.
    """
    x, gate, y = x.contiguous(), gate.contiguous(), torch.empty(down.outputs)
    pointers = x.data_ptr(), gate.data_ptr(), y.data_ptr()
    threads = torch.get_num_threads()
    used = load().optim_gated(up.address, down.address, *pointers, threshold, threads, team())
    if used < 0:
        raise MemoryError
    return y, used


def linear(weight: Tensor, bias: Tensor | None) -> Columns:
    """Columns of a dense `[out, in]` weight in float32 or bf16."""
    return Columns(weight.shape[0], {"kind": KINDS[weight.dtype]}, dense_layout(weight, bias))


def packed(
    q: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, bias: Tensor | None
) -> Columns:
    """Columns of integers `[out, in]` of at most 4 bits, scale and zero `[out, groups]`."""
    inputs = q.shape[1]
    size = inputs if scheme.group_size == -1 else scheme.group_size
    starts = torch.tensor([*range(0, inputs, size), inputs], dtype=torch.int32)
    tensors = packed_layout(q, scale, zero, scheme, bias) | {"group_of": starts}
    facts = {"kind": INT4, "chunk": cpu_w4a8.chunk_of(scheme), "groups": scale.shape[1]}
    return Columns(q.shape[0], facts, tensors)


def dense_layout(weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    """`weight` `[in, padded out]`, and `bias` float32 if there is one."""
    tensors = {"weight": _padded(weight.T, TILE)}
    return tensors if bias is None else tensors | {"bias": bias.float().contiguous()}


def packed_layout(
    q: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, bias: Tensor | None
) -> dict[str, Tensor]:
    """`weight` uint8 `[in, padded out / 2]`, `scale` bf16 and `zero` uint8 `[groups, padded out]`.

    Without `zero` it is 8 everywhere.
    """
    tensors = {"weight": _nibbles(q), "scale": _padded(scale.to(torch.bfloat16).T, TILE)}
    middle = 2 ** (scheme.bits - 1)
    if zero is not None or middle != 8:
        zeros = torch.full_like(scale, middle, dtype=torch.uint8) if zero is None else zero
        tensors["zero"] = _padded(zeros.to(torch.uint8).T, TILE)
    return tensors if bias is None else tensors | {"bias": bias.float().contiguous()}


def _padded(rows: Tensor, to: int) -> Tensor:
    """`[n, m]` contiguous, m filled up with zeros to a multiple of `to`."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % to)).contiguous()


def _nibbles(q: Tensor) -> Tensor:
    """uint8 `[out, in]` below 16 -> `[in, padded out / 2]`: n and n + 32 of a tile share a byte."""
    tiles = _padded(q.T, TILE).view(q.shape[1], -1, 2, TILE // 2)
    packed: Tensor = tiles[:, :, 0] | tiles[:, :, 1] << 4
    return packed.flatten(1).contiguous()


def supports(scheme: Scheme) -> bool:
    """int4 and fewer bits, in groups that a chunk of activations divides."""
    return scheme.bits <= 4 and (scheme.group_size % 16 == 0 or scheme.group_size == -1)


@cache
def load() -> ctypes.CDLL:
    """The compiled kernel. Raises NoKernel with the reason."""
    lib = library("cpu_sparse")
    pointer = ctypes.c_void_p
    lib.optim_sparse.argtypes = [*[pointer] * 3, ctypes.c_float, ctypes.c_int, pointer]
    lib.optim_sparse.restype = ctypes.c_int64
    lib.optim_gated.argtypes = [*[pointer] * 5, ctypes.c_float, ctypes.c_int, pointer]
    lib.optim_gated.restype = ctypes.c_int64
    return lib


@cache
def usable() -> bool:
    """Whether the kernel can be built here and agrees with torch."""
    try:
        check()
    except NoKernel:
        return False
    return True


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
