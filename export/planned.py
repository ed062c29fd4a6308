"""A model that is yet to be quantized, as an exporter looks at it: before hours of work."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optim.export.formats import FORMATS
from optim.export.run import refuse
from optim.recipes.schema import Export
from optim.runtime.formats.blocks import BLOCKS, Blocks
from optim.runtime.formats.schemes import Scheme
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.dense_view import PlainView
from optim.runtime.storage.tensors import TensorInfo

SUFFIX = ".weight"


class PlannedView(PlainView):
    """`checkpoint` with the linears of `schemes` packed; scales are ones, zero points are zero."""

    def __init__(self, checkpoint: Checkpoint, schemes: Mapping[str, Scheme]) -> None:
        super().__init__(checkpoint)
        self.schemes = schemes
        self.tensors |= {module + SUFFIX: module for module in schemes}

    def with_integers(self) -> PlainView:
        return self

    def scheme(self, name: str) -> Scheme | None:
        return self.schemes.get(name.removesuffix(SUFFIX))

    def blocks(self, name: str) -> Blocks | None:
        scheme = self.scheme(name)
        return None if scheme is None or scheme.blocks is None else BLOCKS[scheme.blocks]

    def grid(self, name: str) -> tuple[Tensor, Tensor | None]:
        scheme = self.scheme(name)
        assert scheme is not None, name
        outputs, inputs = self.info(name).shape
        scale = torch.ones(outputs, scheme.groups(inputs), dtype=torch.bfloat16)
        return scale, None if scheme.symmetric else torch.zeros(scale.shape, dtype=torch.uint8)

    def info(self, name: str) -> TensorInfo:
        found = self.checkpoint.tensors
        info = found.get(name) or next(
            i for n, i in found.items() if n.endswith("embed_tokens.weight")
        )
        if self.scheme(name) is None:
            return info
        return TensorInfo(info.shape, torch.float32, 2 * info.nbytes)


def plan(checkpoint: Checkpoint, schemes: Mapping[str, Scheme], wanted: Export) -> dict[str, Any]:
    """What an export of the model will be once its linears are quantized by `schemes`, for the
    screen and `--json`.

    Raises OptimError (2) for what the format cannot hold; scales and zero points that turn out not
    to fit are found only when they are there.
    """
    exporter = FORMATS[wanted.format]
    refuse(checkpoint, wanted, exporter)
    view = PlannedView(checkpoint, schemes) if schemes else PlainView(checkpoint)
    held = exporter.hold(view, wanted)
    return {"format": wanted.format, "output_bytes": sum(item.nbytes for item in held)}
