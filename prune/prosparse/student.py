"""Two copies of one model: the teacher as it was, the student whose weights may move.

What moves is the feed-forward blocks' linears (`ffn`), low-rank updates beside them (`lora`,
arXiv 2106.09685: W + (alpha / r) B A with alpha = 2 r, B = 0 at first), or all weights (`full`).
Moving weights are float32; what stands still is in the device's own dtype.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optim.prune.prosparse.relu import Swapped, feed_forwards, swap
from optim.recipes.schema import ProSparse
from optim.runtime.decoder.linears.source import Source
from optim.runtime.engine.transformers_model import fill
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.walk.walk import find_blocks

LORA_SCALE = 2.0  # alpha / r


class LowRank(nn.Module):
    """y = (W + s B A) x + b; `down` A `[rank, in]`, `up` B `[out, rank]`, float32."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        weight = linear.weight
        bound = math.sqrt(3 / weight.shape[1])
        down = torch.empty(rank, weight.shape[1], device=weight.device).uniform_(-bound, bound)
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))

    def merged(self) -> Tensor:
        """The weight with its update, float32 `[out, in]`."""
        return self.linear.weight.float() + LORA_SCALE * self.up @ self.down

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        y: Tensor = self.linear(x) + LORA_SCALE * update
        return y


@dataclass(slots=True)
class Student:
    """A model in training. `ffns` and `swapped` have one entry a block."""

    model: Any
    prefix: str
    blocks: nn.ModuleList
    ffns: list[nn.Module]
    swapped: list[Swapped]
    moving: dict[str, nn.Parameter]
    """Parameters in training, by name."""

    def weights(self) -> dict[str, Tensor]:
        """Every weight that training has changed, updates merged: name -> float32 tensor."""
        found: dict[str, Tensor] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, LowRank):
                found[f"{name}.weight"] = module.merged().detach()
        plain = {n: p.detach() for n, p in self.moving.items() if not _is_update(self.model, n)}
        return found | plain


def load_teacher(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Any:
    """The model as it is, frozen, in `dtype`, through transformers.

    Raises OptimError (2) where transformers does not know it or tensors are missing.
    """
    model = _load(checkpoint, device, dtype)
    return model.requires_grad_(False)


def load_student(
    checkpoint: Checkpoint, section: ProSparse, device: torch.device, dtype: torch.dtype
) -> Student:
    """The same model with ReLU in place of its activation and `section.train` set to move.

    Raises OptimError (2) for models without one gated feed-forward in each block.
    """
    model = _load(checkpoint, device, dtype).requires_grad_(False)
    prefix, blocks = find_blocks(model)
    ffns = feed_forwards(blocks, checkpoint.name)
    swapped = swap(ffns)
    if section.train == "lora":
        _add_updates(ffns, section.rank)
    moving = model.named_parameters() if section.train == "full" else _inside(model, ffns)
    for name, parameter in list(moving):
        if section.train != "lora" or _is_update(model, name):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    chosen = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return Student(model, prefix, blocks, ffns, swapped, chosen)


def _load(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    factory: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = factory.from_config(checkpoint.hf_config(), dtype=dtype).eval()
    fill(model, Source(checkpoint, device, dtype))
    return model


def _inside(model: Any, ffns: list[nn.Module]) -> list[tuple[str, nn.Parameter]]:
    own = {id(p) for ffn in ffns for p in ffn.parameters()}
    return [(n, p) for n, p in model.named_parameters() if id(p) in own]


def _add_updates(ffns: list[nn.Module], rank: int) -> None:
    for ffn in ffns:
        for name, linear in list(ffn.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(ffn, name, LowRank(linear, rank))


def _is_update(model: Any, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return isinstance(model.get_submodule(owner), LowRank) and leaf in ("up", "down")
