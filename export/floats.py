"""Weights that are written as floats: how far they move on the way."""

import torch

from optim.runtime.formats.schemes import Scheme
from optim.runtime.storage.dense_view import PlainView

FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
SHORT = {torch.float64: "f64", **{dtype: name for name, dtype in FLOATS.items()}}
DIGITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
WIDER = (  # each holds every value of those before the arrow
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
)


def described(model: PlainView, name: str) -> str:
    """What a weight is stored as, in words."""
    dtype = model.info(name).dtype
    return model.kept_as(name) or SHORT.get(dtype, str(dtype).removeprefix("torch."))


def float_change(dtype: torch.dtype, scheme: Scheme | None, to: torch.dtype) -> str:
    """What the float type `to` does to a weight: a plain one, or integers times a scale."""
    if to == torch.float32 and (scheme is not None or dtype != torch.float64):
        return ""  # of integers: what they stand for is that product in f32
    if scheme is None and (dtype == to or (dtype, to) in WIDER):
        return ""
    return f"rounded to {DIGITS[to]} binary digits: at most {2.0 ** -DIGITS[to]:.2g} of its value"
