"""A GGUF file's blocks as pack-quantized: the same integers, for whoever runs them.

Types with tables of vectors (IQ2_XS, IQ3_S ...), stacks of experts and plain tensors are read as
`GgufStore` reads them.
"""

import dataclasses

import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from optim.runtime.formats.bits import words
from optim.runtime.formats.blocks import BLOCKS, Array, Blocks
from optim.runtime.formats.schemes import Scheme
from optim.runtime.storage.blocks import part_of, run_as, scale_type
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.gguf.store import GgufStore, deinterleave
from optim.runtime.storage.integers import IntegerStore
from optim.runtime.storage.tensors import Part, TensorInfo

KEYS = "weight_packed", "weight_scale", "weight_offset"
KINDS = {Kind[name.upper()]: kind for name, kind in BLOCKS.items()}


def with_integers(checkpoint: Checkpoint) -> Checkpoint:
    """The model with its packed linears as such; the same object where nothing is gained."""
    if not isinstance(checkpoint.store, GgufStore):
        return checkpoint
    store = PackedGguf(checkpoint.store)
    return dataclasses.replace(checkpoint, store=store) if store.schemes else checkpoint


class PackedGguf(IntegerStore):
    """See tensors.Store."""

    def __init__(self, inner: GgufStore) -> None:
        self.files, self._inner = inner.files, inner
        self.infos: dict[str, TensorInfo] = {}
        self.schemes: dict[str, Scheme] = {}
        self._where: dict[str, tuple[str, str]] = {}
        self._waiting: dict[str, Tensor] = {}
        """Of the tensor that was read last: what was not asked for yet."""
        for name, info in inner.infos.items():
            kind = KINDS.get(inner.kind(name))
            if kind is None or len(info.shape) != 2:
                self.infos[name] = info
                continue
            stem = name.removesuffix(".weight")
            self.schemes[f"{stem}.weight_packed"] = run_as(kind)
            for key, made in _infos(info.shape, kind).items():
                self.infos[f"{stem}.{key}"] = made
                self._where[f"{stem}.{key}"] = name, key

    def held(self, name: str) -> tuple[str, float] | None:
        """What is packed is read as it is stored."""
        return None if name in self._where else self._inner.held(name)

    def blocks(self, name: str) -> Blocks | None:
        """See IntegerStore."""
        return KINDS[self._inner.kind(self._where[name][0])]

    def raw(self, name: str) -> Array:
        """See IntegerStore."""
        stored = self._where[name][0]
        raw, heads = self._inner.raw(stored), self._inner.turned(stored)
        return deinterleave(torch.from_numpy(raw.copy()), heads).numpy() if heads else raw

    def read(self, part: Part) -> Tensor:
        if part.stored not in self._where:
            return self._inner.read(part)
        name, key = self._where[part.stored]
        if key == "weight_shape":
            return torch.tensor(self._inner.infos[name].shape)
        kind = KINDS[self._inner.kind(name)]
        if part.rows:
            return part_of(self.raw(part.stored)[slice(*part.rows)], kind, key)
        found = self._waiting.pop(part.stored, None)
        if found is None:
            raw, stem = self.raw(part.stored), part.stored.removesuffix(key)
            made = {f"{stem}{k}": part_of(raw, kind, k) for k in KEYS[: 3 if kind.offset else 2]}
            found, self._waiting = made.pop(part.stored), made
        return found


def _infos(shape: tuple[int, ...], kind: Blocks) -> dict[str, TensorInfo]:
    outputs, inputs = shape
    packed, count = words(inputs, run_as(kind).bits), inputs // kind.group
    dtype = scale_type(kind)
    grid = TensorInfo((outputs, count), dtype, dtype.itemsize * outputs * count)
    found = {
        "weight_packed": TensorInfo((outputs, packed), torch.int32, 4 * outputs * packed),
        "weight_scale": grid,
        "weight_shape": TensorInfo((2,), torch.int64, 16),
    }
    return found | ({"weight_offset": grid} if kind.offset else {})
