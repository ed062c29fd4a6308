"""GPTQ: 2, 3, 4 or 8 bits, w = (q - zero) * scale, packed along the inputs.

    qweight  int32 [in*bits/32, out]     dense, the first input in the lowest bits
    qzeros   int32 [in/g, out*bits/32]   zero points; version 1 stores them less one
    scales   fp16  [in/g, out]
    g_idx    int32 [in]                  the group of each input

With "activation order" g_idx is not input // g: inputs of one group lie apart, and no kernel here
reads that. Such a linear is widened when it is read. Version 1 cannot hold a zero point of 0 but by
wrapping to its largest code; so it is read. Source: the layout of AutoGPTQ and GPTQModel.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optim.runtime.formats.bits import pack_rows, unpack_rows
from optim.runtime.formats.schemes import Scheme
from optim.runtime.storage.foreign.layout import (
    FLOATS,
    WORDS,
    Held,
    Pieces,
    Read,
    groups,
    lies,
    must_be,
    need,
    number,
    refused,
)

BITS = (2, 3, 4, 8)
VERSIONS = {"gptq": 1, "gptq_v2": 2}


def zero_points(words: Tensor, bits: int, version: int) -> Tensor:
    """qzeros -> uint8 [out, groups]."""
    stored = unpack_rows(words, bits, words.shape[1] * 32 // bits)
    if version == 1:
        stored = (stored + 1) & ((1 << bits) - 1)
    return stored.T.contiguous()


def pack_zeros(zero: Tensor, bits: int, version: int) -> Tensor:
    """uint8 [out, groups] -> qzeros; the inverse of `zero_points`."""
    stored = (zero - 1) & ((1 << bits) - 1) if version == 1 else zero
    return pack_rows(stored.T.contiguous(), bits)


class Gptq:
    """See layout.Layout."""

    pieces: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, config: Mapping[str, Any]) -> None:
        name = str(config.get("checkpoint_format") or "gptq")
        if name not in VERSIONS:
            raise refused("GPTQ", f"of the format {name!r:.60}", f"use {' or '.join(VERSIONS)}")
        own = config.get("dynamic") or {}
        if not isinstance(own, Mapping) or any(str(key).startswith("+:") for key in own):
            fix = "use one whose layers share bits and group size"
            raise refused("GPTQ", "with bits of their own for some layers (dynamic)", fix)
        self.version = VERSIONS[name]
        self.bits = number(config, "bits", among=BITS)
        self.size = number(config, "group_size")
        self.symmetric = config.get("sym") is True

    def open(self, module: str, pieces: Pieces, read: Read) -> Held:
        rows, outputs = need(module, pieces, "qweight", *WORDS)
        inputs = rows * 32 // self.bits
        if rows * 32 % self.bits or outputs * self.bits % 32:
            raise lies(f"{module}.qweight", f"of {rows} x {outputs} holds no {self.bits} bits")
        said = f"{self.bits} bits and groups of {self.size}"
        zeros = need(module, pieces, "qzeros", *WORDS)
        must_be(f"{module}.qzeros", zeros, (zeros[0], outputs * self.bits // 32), said)
        count = groups(module, inputs, self.size)
        must_be(f"{module}.qzeros", zeros, (count, zeros[1]), said)
        must_be(f"{module}.scales", need(module, pieces, "scales", *FLOATS), (count, outputs), said)
        scheme = Scheme(self.bits, self.size, self.symmetric)
        plain = Held(outputs, inputs, pieces["scales"].dtype, scheme, "GPTQ")
        if "g_idx" not in pieces or self._in_order(module, inputs, count, pieces, read):
            return plain
        kind = f"GPTQ {self.bits}-bit, activation order"
        return Held(outputs, inputs, pieces["scales"].dtype, None, kind)

    def _in_order(self, module: str, inputs: int, count: int, pieces: Pieces, read: Read) -> bool:
        name = f"{module}.g_idx"
        if pieces["g_idx"].shape != (inputs,) or pieces["g_idx"].dtype.is_floating_point:
            raise lies(name, f"is {list(pieces['g_idx'].shape)}, expected integers [{inputs}]")
        found = read("g_idx").to(torch.int64)
        if int(found.min()) < 0 or int(found.max()) >= count:
            raise lies(name, f"goes beyond {count} groups")
        return bool((found == torch.arange(inputs) // (inputs // count)).all())

    def part(self, key: str, held: Held, read: Read) -> Tensor:
        if key == "weight_scale":
            return read("scales").T.contiguous()
        if key == "weight_packed":
            if self.symmetric:
                self._require_middle(self._zero(read))
            return read("qweight").view(torch.int32).T.contiguous()
        if key == "weight":
            return self._widened(held, read)
        return pack_rows(self._zero(read).T, self.bits).T.contiguous()

    def _zero(self, read: Read) -> Tensor:
        return zero_points(read("qzeros"), self.bits, self.version)

    def _require_middle(self, zero: Tensor) -> None:
        if int((zero != 1 << (self.bits - 1)).sum()):
            raise lies("qzeros", "are not those of the symmetric weights that config.json says")

    def _widened(self, held: Held, read: Read) -> Tensor:
        q = unpack_rows(read("qweight").view(torch.int32).T, self.bits, held.inputs).float()
        group = read("g_idx").to(torch.int64)
        scale, zero = read("scales").T.float(), self._zero(read).float()
        return ((q - zero[:, group]) * scale[:, group]).to(held.dtype)
