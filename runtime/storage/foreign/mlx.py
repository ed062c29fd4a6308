"""MLX "affine": 2, 3, 4, 5, 6 or 8 bits, w = q * scale + bias with a float bias.

    weight  uint32 [out, in*bits/32]    dense along the inputs: the bytes of `weight_packed`
    scales  float  [out, in/g]          in the model's dtype
    biases  float  [out, in/g]

config.json says `quantization`: group_size, bits, and by its path what a module has of its own. A
module is packed where it has scales; embeddings may be. Source: MLX's docs, mlx-lm's checkpoints.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optim.runtime.formats.bits import words
from optim.runtime.formats.schemes import BITS, Scheme
from optim.runtime.storage.foreign.layout import (
    FLOATS,
    Held,
    Pieces,
    Read,
    lies,
    must_be,
    need,
    number,
    refused,
)

SIZES = (16, 32, 64, 128)


class Mlx:
    """See layout.Layout."""

    pieces: tuple[str, ...] = ("scales", "biases", "weight")

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self._sizes("", config)

    def _sizes(self, module: str, config: Mapping[str, Any]) -> tuple[int, int]:
        mode = config.get("mode", self.config.get("mode", "affine"))
        if mode != "affine":
            raise refused("MLX", f"of the mode {mode!r}", "use one of the mode 'affine'")
        of = {key: self.config[key] for key in ("bits", "group_size") if key in self.config}
        of |= config
        return number(of, "bits", among=BITS), number(of, "group_size", among=SIZES)

    def open(self, module: str, pieces: Pieces, read: Read) -> Held:
        own = self.config.get(module)
        bits, size = self._sizes(module, own if isinstance(own, Mapping) else {})
        outputs, count = need(module, pieces, "scales", *FLOATS)
        inputs = count * size
        said = f"{bits} bits and groups of {size}"
        for key, dtypes, shape in (
            ("weight", (torch.uint32,), (outputs, words(inputs, bits))),
            ("biases", (pieces["scales"].dtype,), (outputs, count)),
        ):
            must_be(f"{module}.{key}", need(module, pieces, key, *dtypes), shape, said)
        if inputs * bits % 32:
            raise lies(module, f"of {inputs} inputs holds no {bits} bits")
        scheme = Scheme(bits, size, symmetric=False, offset=True)
        return Held(outputs, inputs, pieces["scales"].dtype, scheme, "MLX")

    def part(self, key: str, held: Held, read: Read) -> Tensor:
        if key == "weight_packed":
            return read("weight").view(torch.int32)
        return read("scales" if key == "weight_scale" else "biases")
