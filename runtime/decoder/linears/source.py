"""The tensors of one checkpoint on their way to a device: what linears are read from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from optim.runtime.storage.checkpoint import Checkpoint

T = TypeVar("T")
Form = Literal["planes", "exact", "bf16"]
"""How the weights of a model packed without loss are held: as planes; as planes, multiplied exactly
as bf16 would be; or decoded at load, as if they had never been packed."""


@dataclass(slots=True)
class Source:
    """Tensors by name, on `device`; what is computed with is `dtype`."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    form: Form = "planes"
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)

    def has(self, name: str) -> bool:
        return name in self.checkpoint.tensors

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self.checkpoint.read(name).to(self.device, dtype)

    def alike(self, names: Sequence[str], part: str) -> bool:
        """Whether all of `names` have this part, or none has."""
        return len({self.has(f"{name}.{part}") for name in names}) == 1

    def bias(self, names: Sequence[str], dtype: torch.dtype | None = None) -> Tensor | None:
        """The biases of `names` `[out]`, one after the other; None where they have none."""
        found = [self.tensor(f"{n}.bias", dtype) for n in names if self.has(f"{n}.bias")]
        return torch.cat(found) if found else None

    def once(self, make: Callable[["Source"], T]) -> T:
        """`make(self)`, made at the first call: what all linears of a format share in a model."""
        if make not in self._made:
            self._made[make] = make(self)
        found: T = self._made[make]
        return found
