"""The tensors of a checkpoint made elsewhere, read as pack-quantized's with the same integers."""

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from optim.runtime.formats.bits import words
from optim.runtime.formats.blocks import BLOCKS, Array, Blocks
from optim.runtime.formats.schemes import Scheme
from optim.runtime.storage.foreign.layout import Held, Layout, lies
from optim.runtime.storage.integers import IntegerStore
from optim.runtime.storage.tensors import Part, Store, TensorInfo

Module = tuple[str, int | None]
"""A linear's path in the files, and which of a stack of experts it is."""


class ForeignStore(IntegerStore):
    """See tensors.Store. Raises OptimError (2) at open where shapes are not what they must be."""

    def __init__(self, inner: Store, layout: Layout) -> None:
        self.files, self._inner, self._layout = inner.files, inner, layout
        self.infos: dict[str, TensorInfo] = {}
        self.schemes: dict[str, Scheme] = {}
        self._made: dict[str, tuple[Module, str, Held]] = {}
        taken: set[str] = set()
        for path in sorted(_packed(inner, layout.pieces)):
            taken |= self._enter(path)
        self.infos |= {name: info for name, info in inner.infos.items() if name not in taken}

    def _enter(self, path: str) -> set[str]:
        """Open what is stored under `path`; the names of its pieces, none if it is plain."""
        names = {piece: f"{path}.{piece}" for piece in self._layout.pieces}
        names = {p: name for p, name in names.items() if name in self._inner.infos}
        shapes = [self._inner.infos[name].shape for name in names.values()]
        if ".switch_mlp." not in path:
            opened = self._open((path, None), path, names)
        elif any(len(shape) != 3 or shape[0] != shapes[0][0] for shape in shapes):
            raise lies(path, "has pieces that are not stacks of as many experts")
        else:
            opened = True
            for expert in range(shapes[0][0]):
                module = path.replace(".switch_mlp.", f".experts.{expert}.")
                opened &= self._open((path, expert), module, names)
        return set(names.values()) if opened else set()

    def _open(self, where: Module, module: str, names: Mapping[str, str]) -> bool:
        pieces = {piece: self._inner.infos[name] for piece, name in names.items()}
        if where[1] is not None:
            pieces = {piece: _one_of(info) for piece, info in pieces.items()}
        held = self._layout.open(where[0], pieces, partial(self._piece, where))
        if held is None:
            return False
        for key, info in _infos(held).items():
            self.infos[f"{module}.{key}"] = info
            self._made[f"{module}.{key}"] = where, key, held
        if held.scheme is not None:
            self.schemes[f"{module}.weight_packed"] = held.scheme
        return True

    def _piece(self, where: Module, piece: str) -> Tensor:
        return self._inner.read(Part(f"{where[0]}.{piece}", where[1]))

    def blocks(self, name: str) -> Blocks | None:
        """See IntegerStore."""
        return BLOCKS.get(self._made[name][2].kind.lower())

    def raw(self, name: str) -> Array:
        """See IntegerStore."""
        return self._piece(self._made[name][0], "weight_blocks").numpy()

    def held(self, name: str) -> tuple[str, float] | None:
        """What is widened when it is read is stored smaller."""
        if name not in self._made:
            return self._inner.held(name)
        (path, _), _, held = self._made[name]
        if held.scheme is not None:
            return None
        stored = (f"{path}.{piece}" for piece in self._layout.pieces)
        infos = self._inner.infos
        return held.kind, float(sum(infos[n].nbytes for n in stored if n in infos))

    def read(self, part: Part) -> Tensor:
        if part.stored not in self._made:
            return self._inner.read(part)
        where, key, held = self._made[part.stored]
        if key == "weight_shape":
            return torch.tensor([held.outputs, held.inputs])
        tensor = self._layout.part(key, held, partial(self._piece, where))
        return tensor[slice(*part.rows)].clone() if part.rows else tensor


def _packed(store: Store, pieces: tuple[str, ...]) -> set[str]:
    """The paths under which the first of `pieces` is stored."""
    found = (name.rpartition(".") for name in store.infos)
    return {path for path, _, last in found if last == pieces[0]}


def _one_of(info: TensorInfo) -> TensorInfo:
    """One matrix of a stack."""
    shape = info.shape[1:]
    return TensorInfo(shape, info.dtype, math.prod(shape) * info.dtype.itemsize)


def _infos(held: Held) -> dict[str, TensorInfo]:
    """What a linear is read as."""
    scheme, outputs = held.scheme, held.outputs
    if scheme is None:
        return {"weight": _info(held.dtype, outputs, held.inputs)}
    count = scheme.groups(held.inputs)
    found = {
        "weight_packed": _info(torch.int32, outputs, words(held.inputs, scheme.bits)),
        "weight_scale": _info(held.dtype, outputs, count),
        "weight_shape": _info(torch.int64, 2),
    }
    if scheme.offset:
        found["weight_offset"] = _info(held.dtype, outputs, count)
    elif not scheme.symmetric:
        found["weight_zero_point"] = _info(torch.int32, words(outputs, scheme.bits), count)
    return found


def _info(dtype: torch.dtype, *shape: int) -> TensorInfo:
    return TensorInfo(shape, dtype, math.prod(shape) * dtype.itemsize)
