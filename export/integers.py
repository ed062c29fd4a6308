"""What formats share that hold a weight's integers: which weights, their grids, what moves.

Linears inside the blocks that are packed keep their integers; all else is written as floats. A
scale that serves more inputs than the format has in a group is repeated.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from optim.export.exporter import STEPS, Held, Plan, refuse
from optim.export.floats import SHORT, described, float_change
from optim.export.folder import Unit
from optim.runtime.formats.schemes import Scheme
from optim.runtime.storage.dense_view import PlainView
from optim.runtime.storage.writer import Entries

SIZES = (32, 64, 128)  # groups that the kernels of others have
OTHERWISE = "use --format compressed-tensors or safetensors"
IN_BLOCK = ".layers."

Pieces = Mapping[str, Tensor]
"""Of one linear, by the last part of their names."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A packed weight `[out, in]`: w = (q - zero) * scale, or q * scale + offset."""

    name: str
    shape: tuple[int, ...]
    scheme: Scheme
    scale: Tensor
    """Float `[out, groups]`."""
    zero: Tensor | None
    """uint8 `[out, groups]`; None where it is an offset that no integer gives."""
    offset: Tensor | None
    kept: str
    """How it is stored, in words."""

    @property
    def size(self) -> int:
        """Inputs that share a scale."""
        return int(self.shape[1]) // self.scale.shape[1]

    @property
    def symmetric(self) -> bool:
        """Whether all zero points are the middle of the codes."""
        middle = 1 << (self.scheme.bits - 1)
        return self.zero is not None and bool((self.zero == middle).all())

    def spread(self, size: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Scales, zero points and offsets for groups of `size`, which divides its own."""
        times = self.size // size

        def wide(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.repeat_interleave(times, 1)

        return self.scale.repeat_interleave(times, 1), wide(self.zero), wide(self.offset)


def grids(model: PlainView, everywhere: bool = False) -> dict[str, Grid]:
    """The packed linears of the blocks, or all packed weights. OptimError (2) if there are none."""
    names = [name for name in model.tensors if model.scheme(name) is not None]
    found = {name: _grid(model, name) for name in names if everywhere or IN_BLOCK in name}
    if not found:
        fix = "quantize it first: optim quantize"
        raise refuse(model, "it has no integers that this format could take over", fix)
    return found


def _grid(model: PlainView, name: str) -> Grid:
    scheme, (scale, other) = model.scheme(name), model.grid(name)
    assert scheme is not None
    zero, offset = (None, other) if scheme.offset else (other, None)
    if offset is not None:
        zero = integer_zeros(scale, offset, scheme.bits)
    elif zero is None:
        zero = torch.full(scale.shape, 1 << (scheme.bits - 1), dtype=torch.uint8)
    return Grid(name, model.info(name).shape, scheme, scale, zero, offset, described(model, name))


def integer_zeros(scale: Tensor, offset: Tensor, bits: int) -> Tensor | None:
    """Zero points z for which every offset is -z * scale as its dtype holds that; None: no such."""
    s, o = scale.double(), offset.double()
    z = torch.where(s == 0, 0, -o / torch.where(s == 0, 1, s)).round()
    fits = (z >= 0) & (z < 1 << bits) & ((-z * s).to(offset.dtype) == offset)
    return z.to(torch.uint8) if bool(fits.all()) else None


def require_zeros(model: PlainView, grid: Grid, fix: str) -> Tensor:
    """The zero points of a grid; OptimError (2) if it has none."""
    if grid.zero is None:
        why = f"{grid.name} adds floats to its integers, and this format takes integers away"
        raise refuse(model, why, fix)
    return grid.zero


def common_size(model: PlainView, found: Iterable[Grid], sizes: tuple[int, ...] = SIZES) -> int:
    """The largest group that divides those of all grids; OptimError (2) where no kernel has it."""
    size = math.gcd(*(grid.size for grid in found))
    fits = [known for known in sizes if size % known == 0]
    if not fits:
        known = ", ".join(map(str, sizes))
        why = f"its groups of {size} are not a multiple of any that is read: {known}"
        fix = f"`optim quantize --group-size 64` (or 32, or 128), or {OTHERWISE}"
        raise refuse(model, why, fix)
    return max(fits)


def scale_change(model: PlainView, grid: Grid, to: torch.dtype) -> str:
    """How far scales move when they become `to`. OptimError (2) where they do not fit."""
    moved, before = grid.scale.to(to).double(), grid.scale.double()
    if not bool(moved.isfinite().all()):
        raise refuse(model, f"scales of {grid.name} are too large for fp16", OTHERWISE)
    worst = float(((moved - before).abs() / before.abs().clamp(min=1e-300)).max())
    return f"scales rounded to {SHORT[to]}: at most {worst:.1g} of their value" if worst else ""


def offset_change(grid: Grid, to: torch.dtype) -> str:
    """How far offsets in `to` are from those of the grid."""
    scale = grid.scale.double()
    wanted = -grid.zero.double() * scale if grid.offset is None else grid.offset.double()  # type: ignore[union-attr]
    off = (wanted.to(to).double() - wanted).abs() / scale.abs().clamp(min=1e-300)
    worst = float(torch.where(scale == 0, 0, off).max())
    return f"offsets rounded to {SHORT[to]}: at most {worst:.1g} {STEPS}" if worst else ""


def held(grid: Grid, form: str, pieces: Entries, change: str) -> Held:
    """A weight that keeps its integers."""
    nbytes = sum(math.prod(shape) * dtype.itemsize for dtype, shape in pieces.values())
    return Held(grid.name, grid.shape, grid.kept, form, nbytes, change)


def float_held(model: PlainView, name: str, to: torch.dtype | None) -> Held:
    """A weight that is written as floats: `to`, or as it is stored."""
    info, scheme = model.info(name), model.scheme(name)
    dtype = to or info.dtype
    change = float_change(info.dtype, scheme, dtype)
    nbytes = math.prod(info.shape) * dtype.itemsize
    return Held(name, info.shape, described(model, name), SHORT[dtype], nbytes, change)


def float_unit(made: Plan, name: str, to: torch.dtype | None) -> Unit:
    """The same, to be written. OptimError (2) for a value that `to` cannot hold."""
    info, stored = made.model.info(name), made.checkpoint.disk_name(name)
    dtype = to or info.dtype

    def make() -> Iterator[tuple[str, Tensor]]:
        before = made.model.read(name)
        tensor = before.to(dtype)
        if not bool(tensor.isfinite().all()) and bool(before.isfinite().all()):
            raise refuse(made.model, f"{name} has values too large for {SHORT[dtype]}", OTHERWISE)
        yield stored, tensor

    return Unit({stored: (dtype, info.shape)}, make)


def integer_unit(made: Plan, name: str, pieces: Entries, pack: Callable[[], Pieces]) -> Unit:
    """The pieces of one linear under its published name."""
    stem = made.checkpoint.disk_name(name).removesuffix(".weight")
    entries = {f"{stem}.{piece}": entry for piece, entry in pieces.items()}

    def make() -> Iterator[tuple[str, Tensor]]:
        yield from ((f"{stem}.{piece}", tensor) for piece, tensor in pack().items())

    return Unit(entries, make)
