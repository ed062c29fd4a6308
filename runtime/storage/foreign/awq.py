"""AutoAWQ "gemm": 4 bits, w = (q - zero) * scale, eight outputs a word.

    qweight  int32 [in, out/8]      nibble i of word c is output 8c + ORDER[i]
    qzeros   int32 [in/g, out/8]    zero points, in the same order
    scales   fp16  [in/g, out]

Source: the layout of AutoAWQ's WQLinear_GEMM, as vLLM and transformers read it.
"""

from collections.abc import Mapping
from typing import Any

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
    must_be,
    need,
    number,
    refused,
)

BITS = 4
EIGHT = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
BACK = tuple(ORDER.index(output) for output in range(EIGHT))


def pack(values: Tensor) -> Tensor:
    """uint8 [out, n] below 16 -> int32 [n, out/8]; 8 must divide out."""
    turned = values.T.reshape(values.shape[1], -1, EIGHT)[:, :, ORDER]
    return pack_rows(turned.reshape(values.shape[1], -1), BITS)


def unpack(words: Tensor) -> Tensor:
    """int32 [n, out/8] -> uint8 [out, n]; the inverse of `pack`."""
    rows = words.shape[0]
    natural = unpack_rows(words, BITS, words.shape[1] * EIGHT).view(rows, -1, EIGHT)
    return natural[:, :, BACK].reshape(rows, -1).T.contiguous()


class Awq:
    """See layout.Layout."""

    pieces: tuple[str, ...] = ("qweight", "qzeros", "scales")

    def __init__(self, config: Mapping[str, Any]) -> None:
        version = str(config.get("version", config.get("format", "gemm"))).lower()
        if version != "gemm":
            raise refused("AWQ", f"of the version {version!r}", "use one of the version 'gemm'")
        number(config, "bits", "w_bit", among=(BITS,))
        self.size = number(config, "group_size", "q_group_size")

    def open(self, module: str, pieces: Pieces, read: Read) -> Held:
        inputs, words = need(module, pieces, "qweight", *WORDS)
        count, outputs = groups(module, inputs, self.size), words * EIGHT
        said = f"4 bits and groups of {self.size}"
        for key, dtypes, shape in (
            ("qzeros", WORDS, (count, words)),
            ("scales", FLOATS, (count, outputs)),
        ):
            must_be(f"{module}.{key}", need(module, pieces, key, *dtypes), shape, said)
        scheme = Scheme(BITS, self.size, symmetric=False)
        return Held(outputs, inputs, pieces["scales"].dtype, scheme, "AWQ")

    def part(self, key: str, held: Held, read: Read) -> Tensor:
        if key == "weight_scale":
            return read("scales").T.contiguous()
        if key == "weight_packed":
            return pack_rows(unpack(read("qweight")), BITS)
        return pack_rows(unpack(read("qzeros")).T, BITS).T.contiguous()
