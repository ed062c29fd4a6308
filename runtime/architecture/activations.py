"""What stands between the projections of a feed-forward, under transformers' names."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_fast": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


def activation(name: str, threshold: float) -> Activation:
    """The activation `name`, a ReLU with its `threshold`. Raises OptimError (2) for another."""
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise OptimError(f"activation {name!r:.60} is not known", f"known are: {known}", USAGE)
    if name == "relu" and threshold > 0:
        return partial(fatrelu, threshold=threshold)
    return ACTIVATIONS[name]


def fatrelu(x: Tensor, threshold: float) -> Tensor:
    """x where it is positive and above `threshold`, else 0 (arXiv 2402.13516, section 3.3)."""
    return F.relu(x) if threshold <= 0 else F.threshold(x, threshold, 0.0)
