"""y = W x on a CPU with 4-bit weights where many x are left out, through `skip_int4.c`.

Weights are held input by input, so that what multiplies nothing is not read. Activations are
rounded to int8 as in w4a8.py, which makes a threshold that leaves nothing out the same sum.

Memory is fetched in runs: of 64 to 512 bytes here and there, what lies between comes along, and
nothing is gained by not wanting it. Tiles are therefore as wide as `LINES`, 4 KB of an input; where
all inputs are read (NOTHING), `NARROW` ones are read faster.
"""

import ctypes
from functools import cache
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from optim.runtime.formats.schemes import Scheme
from optim.runtime.kernels.compile import NoKernel, library, team, works
from optim.runtime.kernels.cpu import w4a8
from optim.runtime.kernels.door import Struct, WrongTensor, address
from optim.runtime.kernels.huge_pages import use_huge_pages

NOTHING = -1.0  # a threshold that skips nothing, not even zeros
CHUNK = 64  # inputs that are rounded together, at most
HALF = 64  # outputs that weights are padded to: 32 bytes
LINES = 64  # lines of 64 bytes, 128 outputs, of a tile
NARROW = 2


class CColumns(Struct):
    """`Columns` of optim.h."""

    NAME = "Columns"

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "padded", "lines")),
        *((name, ctypes.c_int64) for name in ("groups", "runs")),
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "zero")),
        *((name, ctypes.c_void_p) for name in ("starts", "group_of", "bias")),
        *((name, ctypes.c_int64) for name in ("used", "calls")),
    )


class Columns:
    """A 4-bit linear held input by input; `packed` makes one."""

    READ_AS: ClassVar[str] = "columns"

    def __init__(
        self,
        outputs: int,
        lines: int,
        groups: Tensor,
        tensors: dict[str, Tensor],
        bias: Tensor | None,
        chunk: int = CHUNK,
    ) -> None:
        """`groups` int64 [groups + 1]: where they begin. Inputs of a group are rounded together by

        `chunk`, at most CHUNK. `tensors`: `weight` uint8, `scale` bf16, perhaps `zero` uint8, flat
        as optim.h says. `bias` `[outputs]`.
        """
        self.inputs, self.outputs, self.lines = int(groups[-1]), outputs, lines
        self.groups, self.tensors = groups, dict(tensors)
        self.bias = None if bias is None else bias.float().contiguous()
        self._starts, self._group_of = _runs(groups, chunk)
        use_huge_pages(tensors["weight"])
        count, padded, runs = len(groups) - 1, outputs + -outputs % HALF, len(self._group_of)
        self._columns = columns = CColumns(
            inputs=self.inputs,
            outputs=outputs,
            padded=padded,
            lines=lines,
            groups=count,
            runs=runs,
        )
        columns.point("weight", tensors["weight"], torch.uint8, self.inputs * padded // 2)
        columns.point("scale", tensors["scale"], torch.bfloat16, count * padded)
        columns.point("zero", tensors.get("zero"), torch.uint8, count * padded)
        columns.point("starts", self._starts, torch.int32, runs + 1)
        columns.point("group_of", self._group_of, torch.int32, runs)
        columns.point("bias", self.bias, torch.float32, outputs)
        self.address = ctypes.addressof(columns)
        self._run, self._team = load().optim_columns_run, team()

    @property
    def used(self) -> int:
        """Inputs that were read in all `calls` so far that could leave some out."""
        return int(self._columns.used)

    @property
    def calls(self) -> int:
        return int(self._columns.calls)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def tiles(self) -> list[dict[str, Tensor]]:
        """Views of every tile: `weight` `[in, width / 2]`, `scale` and `zero` `[groups, width]`."""
        padded, step = int(self._columns.padded), 2 * HALF * self.lines
        widths = [min(step, padded - at) for at in range(0, padded, step)]
        tiles: list[dict[str, Tensor]] = [{} for _ in widths]
        for name, flat in self.tensors.items():
            rows, to_a_byte = (self.inputs, 2) if name == "weight" else (len(self.groups) - 1, 1)
            parts = torch.split(flat, [rows * width // to_a_byte for width in widths])
            for tile, part in zip(tiles, parts, strict=True):
                tile[name] = part.view(rows, -1)
        return tiles

    def wide(self, part: slice) -> Tensor:
        """Some inputs' weights in float32: `[part, out]`."""
        inputs = torch.arange(self.inputs)[part]
        group = torch.searchsorted(self.groups[1:], inputs, right=True)
        found = []
        for tile in self.tiles():
            zero = tile["zero"].float()[group] if "zero" in tile else 8.0
            found.append((_opened(tile["weight"][part]) - zero) * tile["scale"].float()[group])
        return torch.cat(found, 1)[:, : self.outputs]

    def __call__(self, x: Tensor, threshold: float = NOTHING) -> Tensor:
        """x float32 `[in]` -> `[out]`, or `[tokens, in]` -> `[tokens, out]`.

        Inputs up to `threshold` in size are left out.
        """
        x, threads = x.contiguous(), torch.get_num_threads()
        y, tokens = torch.empty(*x.shape[:-1], self.outputs), x.numel() // self.inputs
        given = address(x, torch.float32, tokens * self.inputs)
        made = address(y, torch.float32, tokens * self.outputs)
        if self._run(self.address, given, made, tokens, threshold, threads, self._team):
            raise MemoryError
        return y


def packed(
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    scheme: Scheme,
    bias: Tensor | None,
    lines: int = LINES,
) -> Columns:
    """Columns of integers `[out, in]` of at most 4 bits, scale bf16 and zero `[out, groups]`.

    In tiles of `lines`, LINES or NARROW.
    """
    outputs, inputs = q.shape
    size = inputs if scheme.group_size == -1 else scheme.group_size
    middle = 2 ** (scheme.bits - 1)
    if zero is None and middle != 8:
        zero = torch.full_like(scale, middle, dtype=torch.uint8)
    tensors = {
        "weight": _tiled(_closed(q.T), HALF * lines),
        "scale": _tiled(_padded(scale.to(torch.bfloat16).T), 2 * HALF * lines),
    }
    if zero is not None:
        tensors["zero"] = _tiled(_padded(zero.to(torch.uint8).T), 2 * HALF * lines)
    groups = torch.tensor([*range(0, inputs, size), inputs])
    return Columns(outputs, lines, groups, tensors, bias, w4a8.chunk_of(scheme))


def supports(scheme: Scheme) -> bool:
    """At most 4 bits, in groups that 16 divides, or whole channels: what w4a8 rounds alike."""
    return scheme.bits <= 4 and (scheme.group_size % 16 == 0 or scheme.group_size == -1)


def _runs(groups: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Groups cut into chunks: starts int32 [runs + 1], and the group of each run int32 [runs]."""
    bounds = groups.tolist()
    if bounds[0] or bounds != sorted(bounds) or not 0 < chunk <= CHUNK:
        raise WrongTensor(f"groups {bounds} of inputs, {chunk} rounded together")
    cut = [
        (at, group)
        for group, (first, end) in enumerate(pairwise(bounds))
        for at in range(first, end, chunk)
    ]
    starts = torch.tensor([*(at for at, _ in cut), bounds[-1]], dtype=torch.int32)
    return starts, torch.tensor([group for _, group in cut], dtype=torch.int32)


def _closed(q: Tensor) -> Tensor:
    """uint8 `[in, out]` below 16 -> `[in, padded out / 2]`.

    Of 64 outputs, o = 32 h + 16 a + 8 b + 4 c + d is half h of byte 16 c + 8 a + 4 b + d: so the
    kernel's interleaved sums come out in order.
    """
    halves = _padded(q).view(len(q), -1, 2, 2, 2, 2, 4).permute(0, 1, 2, 5, 3, 4, 6)
    low, high = halves.reshape(len(q), -1, 2, HALF // 2).unbind(2)
    return (low | high << 4).flatten(1)


def _padded(rows: Tensor) -> Tensor:
    """`[n, m]` with m filled up to a multiple of 64."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % HALF))


def _opened(weight: Tensor) -> Tensor:
    """The inverse of `_closed`, in float32: `[in, padded out]`."""
    halves = torch.stack((weight & 15, weight >> 4)).view(2, len(weight), -1, 2, 2, 2, 4)
    return halves.permute(1, 2, 0, 4, 5, 3, 6).reshape(len(weight), -1).float()


def _tiled(rows: Tensor, step: int) -> Tensor:
    """`[n, m]` cut into tiles of `step` columns, laid out one by one."""
    return torch.cat([tile.reshape(-1) for tile in torch.split(rows, step, 1)])


@cache
def load() -> ctypes.CDLL:
    """The compiled kernel. Raises NoKernel with the reason."""
    lib = library("skip_int4", structs=(CColumns,))
    pointer = ctypes.c_void_p
    numbers = ctypes.c_int64, ctypes.c_float, ctypes.c_int
    lib.optim_columns_run.argtypes = [*[pointer] * 3, *numbers, pointer]
    return lib


def usable() -> bool:
    """Whether the kernel can be built here and agrees with w4a8's reference."""
    return works(check)


@cache
def check() -> str:
    """Compares the kernel with torch on odd shapes. Raises NoKernel."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(192, generator=generator)
    for scheme in (Scheme(4, 64, False), Scheme(3, 32, True)):
        groups = scheme.groups(192)
        q = torch.randint(0, 1 << scheme.bits, (211, 192), generator=generator).to(torch.uint8)
        scale = (torch.rand(211, groups, generator=generator) + 0.1).bfloat16()
        zero = torch.randint(0, 8, (211, groups), generator=generator).to(torch.uint8)
        parts = q, scale, None if scheme.symmetric else zero
        wanted = w4a8.reference(x[None], *parts, scheme)[0]
        for lines in (1, LINES):
            error = (packed(*parts, scheme, None, lines)(x) - wanted).abs().max()
            if not error < 1e-5 * wanted.abs().max():
                raise NoKernel(f"it disagrees with torch by {float(error):.1e}")
    return "skips 4-bit columns"
