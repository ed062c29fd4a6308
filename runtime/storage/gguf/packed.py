"""A GGUF file's blocks of 32 as pack-quantized: the same integers, for whoever runs them.

    Q4_0, Q5_0, Q8_0    w = (q - middle) * d       symmetric, scale d in fp16
    Q4_1, Q5_1          w = q * d + m              with m as a float offset

Types with other blocks (Q4_K, Q6_K, IQ4_NL ...), stacks of experts and plain tensors are read as
`GgufStore` reads them. Source of the layouts: ggml's docs and the `gguf` package.
"""

import dataclasses

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from optim.runtime.formats.bits import pack_rows, words
from optim.runtime.formats.schemes import Scheme
from optim.runtime.kernels.door import Array
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.gguf.store import GgufStore, deinterleave
from optim.runtime.storage.integers import IntegerStore
from optim.runtime.storage.tensors import Part, TensorInfo

GROUP = 32
SCHEMES = {
    Kind.Q4_0: Scheme(4, GROUP, symmetric=True),
    Kind.Q4_1: Scheme(4, GROUP, symmetric=False, offset=True),
    Kind.Q5_0: Scheme(5, GROUP, symmetric=True),
    Kind.Q5_1: Scheme(5, GROUP, symmetric=False, offset=True),
    Kind.Q8_0: Scheme(8, GROUP, symmetric=True),
}
HALF = torch.float16


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
        for name, info in inner.infos.items():
            scheme = SCHEMES.get(inner.kind(name))
            if scheme is None or len(info.shape) != 2:
                self.infos[name] = info
                continue
            stem = name.removesuffix(".weight")
            self.schemes[f"{stem}.weight_packed"] = scheme
            for key, made in _infos(info.shape, scheme).items():
                self.infos[f"{stem}.{key}"] = made
                self._where[f"{stem}.{key}"] = name, key

    def held(self, name: str) -> tuple[str, float] | None:
        """What is packed is read as it is stored."""
        return None if name in self._where else self._inner.held(name)

    def read(self, part: Part) -> Tensor:
        if part.stored not in self._where:
            return self._inner.read(part)
        name, key = self._where[part.stored]
        shape, scheme = self._inner.infos[name].shape, self.schemes[_packed_name(name)]
        if key == "weight_shape":
            return torch.tensor(shape)
        raw = self._inner.raw(name).reshape(shape[0], shape[1] // GROUP, -1)
        if key == "weight_packed":
            made = _words(raw, scheme).view(shape[0], -1)
        else:
            at = 0 if key == "weight_scale" else 2
            made = torch.from_numpy(raw[:, :, at : at + 2].copy()).view(HALF).squeeze(-1)
        heads = self._inner.turned(name)
        made = deinterleave(made, heads) if heads else made
        return made[slice(*part.rows)].clone() if part.rows else made


def _packed_name(name: str) -> str:
    return f"{name.removesuffix('.weight')}.weight_packed"


def _infos(shape: tuple[int, ...], scheme: Scheme) -> dict[str, TensorInfo]:
    (outputs, inputs), count = shape, shape[1] // GROUP
    packed = words(inputs, scheme.bits)
    grid = TensorInfo((outputs, count), HALF, 2 * outputs * count)
    found = {
        "weight_packed": TensorInfo((outputs, packed), torch.int32, 4 * outputs * packed),
        "weight_scale": grid,
        "weight_shape": TensorInfo((2,), torch.int64, 16),
    }
    return found | ({"weight_offset": grid} if scheme.offset else {})


def _words(raw: Array, scheme: Scheme) -> Tensor:
    """Bytes of blocks `[out, blocks, size]` -> int32 words of their 32 codes, `bits.pack_rows`.

    Of 4 bits, and the low ones of 5: byte i of 16 has the codes i and i + 16.
    """
    at = 4 if scheme.offset else 2
    if scheme.bits == 8:
        return torch.from_numpy(raw[:, :, at:] ^ np.uint8(0x80)).view(torch.int32)
    halves = torch.from_numpy(raw[:, :, -GROUP // 2 :].copy())
    codes = torch.cat([halves & 15, halves >> 4], -1)
    if scheme.bits == 5:
        top = np.unpackbits(raw[:, :, at : at + 4], axis=-1, bitorder="little")
        codes |= torch.from_numpy(top << np.uint8(4))
    return pack_rows(codes.view(raw.shape[0], -1), scheme.bits)
