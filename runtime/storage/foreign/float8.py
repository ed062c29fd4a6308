"""Weights in 8-bit floats: read as bf16, each the product of its stored value and its scale.

    weight            F8_E4M3 [out, in]
    weight_scale      float [out, 1], [1] or [out/b, in/b]     compressed-tensors `float-quantized`
    weight_scale_inv  float [out/b, in/b]                      quant_method `fp8`, blocks of b x b

Activations, which such a model may say to round as well, are not rounded here.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optim.runtime.storage.foreign.layout import FLOATS, Held, Pieces, Read, lies


class Float8:
    """See layout.Layout."""

    pieces: tuple[str, ...] = ("weight", "weight_scale", "weight_scale_inv", "input_scale")

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Everything is in the shapes."""

    def open(self, module: str, pieces: Pieces, read: Read) -> Held | None:
        weight = pieces.get("weight")
        if weight is None or weight.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
            return None
        scale = pieces.get("weight_scale_inv", pieces.get("weight_scale"))
        if len(weight.shape) != 2 or not all(weight.shape):
            raise lies(f"{module}.weight", f"is {list(weight.shape)}, expected two sizes")
        if scale is None:
            raise lies(f"{module}.weight_scale", "is missing")
        if scale.dtype not in FLOATS or _spread(weight.shape, scale.shape) is None:
            shapes = f"{list(scale.shape)} for a weight {list(weight.shape)}"
            raise lies(f"{module}.weight_scale", f"is {shapes}")
        return Held(*weight.shape, torch.bfloat16, None, "fp8")

    def part(self, key: str, held: Held, read: Read) -> Tensor:
        weight, scale = read("weight").float(), self._scale(read).float()
        steps = _spread(weight.shape, scale.shape)
        assert steps is not None, "checked by open"
        for axis, step in enumerate(steps):
            if scale.dim() == 2 and step > 1:
                scale = scale.repeat_interleave(step, axis).narrow(axis, 0, weight.shape[axis])
        return (weight * scale).to(held.dtype)

    def _scale(self, read: Read) -> Tensor:
        try:
            return read("weight_scale_inv")
        except KeyError:
            return read("weight_scale")


def _spread(weight: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, int] | None:
    """How many rows and columns share a scale; 1 where it is one of all; None: it cannot be."""
    if scale in ((), (1,), (1, 1)):
        return 1, 1
    if len(scale) != 2 or not all(scale):
        return None
    steps = []
    for size, count in zip(weight, scale, strict=True):
        step = (
            1
            if count in (1, size)
            else next((b for b in (128, 64, 32) if -(-size // b) == count), 0)
        )
        if not step:
            return None
        steps.append(step)
    return steps[0], steps[1]
