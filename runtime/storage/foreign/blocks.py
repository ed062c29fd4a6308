"""GGUF's blocks in a folder of ours: what `optim quantize --grid q4_0` stores.

    weight_blocks  uint8 [out, bytes of a row]      see formats/blocks.py

config.json names each module's type. `optim export` copies the blocks into a GGUF file.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.formats.blocks import BLOCKS, Blocks
from optim.runtime.storage.blocks import part_of, run_as, scale_type
from optim.runtime.storage.foreign.layout import Held, Pieces, Read, lies, need

METHOD = "optim-gguf-blocks"  # quant_method of the configuration


def blocks_config(modules: Mapping[str, str]) -> dict[str, Any]:
    """The `quantization_config` of linears by their published names."""
    return {"quant_method": METHOD, "format_version": 1, "modules": dict(sorted(modules.items()))}


class InBlocks:
    """See layout.Layout."""

    pieces: tuple[str, ...] = ("weight_blocks",)

    def __init__(self, config: Mapping[str, Any]) -> None:
        modules = config.get("modules")
        if config.get("format_version") != 1 or not isinstance(modules, Mapping):
            fix = "make it again with this version of optim"
            raise OptimError(f"its {METHOD} configuration is not one of version 1", fix, USAGE)
        self.modules = modules

    def kind(self, module: str) -> Blocks:
        """The type of a module's blocks."""
        name = self.modules.get(module)
        if not isinstance(name, str) or name not in BLOCKS:
            raise lies(f"{module}.weight_blocks", f"has blocks of the type {name!r}")
        return BLOCKS[name]

    def open(self, module: str, pieces: Pieces, read: Read) -> Held:
        kind = self.kind(module)
        outputs, nbytes = need(module, pieces, "weight_blocks", torch.uint8)
        if nbytes % kind.nbytes:
            raise lies(f"{module}.weight_blocks", f"has rows of {nbytes} bytes, no {kind.name}")
        inputs = nbytes // kind.nbytes * kind.size
        return Held(outputs, inputs, scale_type(kind), run_as(kind), kind.name.upper())

    def part(self, key: str, held: Held, read: Read) -> Tensor:
        return part_of(read("weight_blocks").numpy(), BLOCKS[held.kind.lower()], key)
