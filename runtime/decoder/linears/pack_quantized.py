"""A linear that stays packed: holds the stored tensors, then the layout of this machine's kernel.

The first call (or `prepare`) repacks the weight once for the device it is on and lets go of the
stored tensors; from then on nothing dense exists but what a kernel unpacks for a moment.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.decoder.linears.base import Linear, Table, masked
from optim.runtime.decoder.linears.gathered import gather_rows
from optim.runtime.decoder.linears.source import Source
from optim.runtime.decoder.linears.sparse import SparseLinear, sparse_packed
from optim.runtime.formats.pack_quantized import SUFFIXES, pack, still_packed, unpack
from optim.runtime.formats.schemes import Scheme, SchemeOf
from optim.runtime.kernels import torch_tiles
from optim.runtime.kernels.compile import works
from optim.runtime.kernels.cpu import torch_int4, w4a8
from optim.runtime.kernels.cpu.decode import Reader
from optim.runtime.storage.checkpoint import schemes_of


class PackedLinear(Linear):
    """y = x W^T + b with W packed `[out, in]`; x `[..., in]` of any float dtype, y of the same."""

    weight_packed: Tensor | None
    weight_scale: Tensor | None
    weight_zero_point: Tensor | None
    weight_offset: Tensor | None
    weight_shape: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        scheme: Scheme,
        bias: Tensor | None = None,
        name: str = "weight",
    ) -> None:
        """`tensors` as `packed.pack` makes them; `bias` `[out]`; `name` for messages."""
        super().__init__()
        self.scheme, self.name = scheme, name
        for key in SUFFIXES:
            self.register_buffer(key, tensors.get(key))
        self.register_buffer("bias", bias)
        self.kernel: Any = None
        shape = tensors.get("weight_shape")
        if shape is not None and shape.shape == (2,):  # else `prepare` says what is wrong
            self.out_features, self.in_features = (int(n) for n in shape)

    @classmethod
    def claims(cls, source: Source, names: Sequence[str]) -> bool:
        """Packed alike, and all with a bias or none."""
        scheme_of = source.once(_schemes)
        schemes = {scheme_of(name) if _is_packed(source, name) else None for name in names}
        return None not in schemes and len(schemes) == 1 and source.alike(names, "bias")

    @classmethod
    def load(cls, source: Source, names: Sequence[str], below: float | None = None) -> Linear:
        """See Kind."""
        scheme = source.once(_schemes)(names[0])
        assert scheme is not None
        parts = [cls(_stored(source, n), scheme, source.bias([n]), n) for n in names]
        linear = parts[0] if len(parts) == 1 else fuse(parts)
        if below is not None and (sparse := linear.by_input(below)) is not None:
            return sparse
        return masked(linear.prepare(), below)

    @property
    def nbytes(self) -> int:
        if self.kernel is not None:
            return int(self.kernel.nbytes)
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def alike(self) -> int:
        return w4a8.ALIKE if isinstance(self.kernel, w4a8.Weight) else 1

    @property
    def table(self) -> Table | None:
        return Looked(self.kernel) if isinstance(self.kernel, w4a8.Weight) else None

    @property
    def c_reader(self) -> Reader | None:
        return Reader(self.kernel) if isinstance(self.kernel, w4a8.Weight) else None

    def with_outputs(self, rows: Tensor) -> Linear:
        if isinstance(self.kernel, w4a8.Weight):
            return RepackedLinear(gather_rows(self.kernel, rows))
        return super().with_outputs(rows)

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel is None:
            self.prepare()
        y: Tensor = self.kernel(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))
        return (y if y.dtype == x.dtype else y.to(x.dtype)).view(*x.shape[:-1], y.shape[1])

    def prepare(self, kernel: ModuleType | None = None) -> "PackedLinear":
        """Repacks for `kernel` (default: the best one for the device) and frees the stored form.

        Raises OptimError naming the tensor if the stored form is corrupt.
        """
        first = next(self.buffers())
        chosen = kernel or choose(self.scheme, first.device)
        as_words = (
            chosen is w4a8 and self.scheme.bits == 4 and getattr(self, "in_features", 0) % 8 == 0
        )
        q, scale, zero = self.still_packed() if as_words else self.opened()
        for key in SUFFIXES:
            setattr(self, key, None)
        self.kernel = chosen.Weight(q, scale, zero, self.scheme, self.bias)
        self.bias = None
        return self

    def stored(self) -> dict[str, Tensor]:
        """The stored tensors. Only before `prepare`."""
        return {name: tensor for name, tensor in self.named_buffers() if name in SUFFIXES}

    def by_input(self, threshold: float) -> SparseLinear | None:
        """The same held input by input; None where that does not pay. Only before `prepare`."""
        return sparse_packed(self.opened, self.weight_scale, self.scheme, self.bias, threshold)

    def still_packed(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `opened`, with the integers in their words. Only before `prepare`."""
        return still_packed(self.stored(), self.scheme, self.name)

    def opened(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Integers, scales and zero points; see packed.unpack. Only before `prepare`."""
        return unpack(self.stored(), self.scheme, self.name)


class Looked:
    """A packed weight as an embedding table: the rows that are asked for, in fp32."""

    def __init__(self, kernel: w4a8.Weight) -> None:
        self._kernel = kernel

    def __getitem__(self, ids: Tensor) -> Tensor:
        return self._kernel.picked(ids.flatten()).view(*ids.shape, -1)


class RepackedLinear(Linear):
    """A linear that is a kernel's weight alone."""

    def __init__(self, kernel: w4a8.Weight) -> None:
        super().__init__()
        self.kernel, self.in_features, self.out_features = kernel, kernel.inputs, kernel.outputs

    @property
    def nbytes(self) -> int:
        return self.kernel.nbytes

    @property
    def c_reader(self) -> Reader:
        return Reader(self.kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


def _schemes(source: Source) -> SchemeOf:
    return schemes_of(source.checkpoint)


def _is_packed(source: Source, name: str) -> bool:
    return source.has(f"{name}.weight_packed")


def _stored(source: Source, name: str) -> dict[str, Tensor]:
    """The stored tensors of a linear that are there."""
    return {s: source.tensor(f"{name}.{s}") for s in SUFFIXES if source.has(f"{name}.{s}")}


def fuse(parts: Sequence[PackedLinear]) -> PackedLinear:
    """Linears of one scheme that read one input, as one: outputs side by side.

    `parts` must not be prepared yet. Raises OptimError (2) where schemes, inputs or the presence of
    a bias differ.
    """
    schemes = {part.scheme for part in parts}
    if len(schemes) != 1 or len({part.bias is None for part in parts}) != 1:
        kinds = ", ".join(sorted(map(str, schemes)))
        raise OptimError(f"linears stored in different ways cannot be joined: {kinds}", None, USAGE)
    name = "+".join(part.name for part in parts)
    biases = [part.bias for part in parts if part.bias is not None]
    bias = torch.cat(biases) if biases else None
    if (whole := _side_by_side([part.stored() for part in parts], parts[0].scheme)) is not None:
        return PackedLinear(whole, parts[0].scheme, bias, name)
    opened = [part.opened() for part in parts]
    if len({q.shape[1] for q, _, _ in opened}) != 1:
        raise OptimError("linears with different inputs cannot be joined", None, USAGE)
    q, scale = torch.cat([q for q, _, _ in opened]), torch.cat([s for _, s, _ in opened])
    zeros = [zero for _, _, zero in opened if zero is not None]
    tensors = pack(q, scale, torch.cat(zeros) if zeros else None, parts[0].scheme)
    return PackedLinear(tensors, parts[0].scheme, bias, name)


def _side_by_side(
    parts: Sequence[Mapping[str, Tensor]], scheme: Scheme
) -> dict[str, Tensor] | None:
    """The stored forms joined as they are: no word holds values of two parts. None: not so here."""
    stored = [part["weight_shape"] for part in parts if "weight_shape" in part]
    shapes = [shape.tolist() for shape in stored if shape.shape == (2,)]
    whole_words = (
        scheme.symmetric or scheme.offset or all(out * scheme.bits % 32 == 0 for out, _ in shapes)
    )
    alike = {tuple((k, t.dtype, t.shape[1:]) for k, t in sorted(part.items())) for part in parts}
    same_inputs = len(shapes) == len(parts) and len({inputs for _, inputs in shapes}) == 1
    if not (whole_words and same_inputs and len(alike) == 1):
        return None
    joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    outputs = sum(out for out, _ in shapes)
    return joined | {"weight_shape": parts[0]["weight_shape"].new_tensor([outputs, shapes[0][1]])}


def choose(scheme: Scheme, device: torch.device) -> ModuleType:
    """The best kernel module for `scheme` on `device`: the first that can and passes its check."""
    for kernel in _candidates(device.type):
        if kernel.supports(scheme, device) and works(kernel.check):
            return kernel
    return torch_tiles


@cache
def _candidates(device: str) -> list[ModuleType]:
    """The kernels for a kind of device, best first."""
    if device == "cuda" and find_spec("triton"):
        from optim.runtime.kernels.triton import w4a16

        return [w4a16]
    return [w4a8, torch_int4] if device == "cpu" else []
