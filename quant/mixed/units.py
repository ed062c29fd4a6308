"""What may have a width of its own, and the bytes of each choice.

Linears that read one input (q, k and v; gate and up), and all experts of a block, get one width:
kernels compute them as one, here and in other programs; vLLM loads no others. `apart` gives each
linear that is no expert a width of its own. What no block holds stays as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from optim.quant.needs import packed_bytes
from optim.quant.solver import Shapes
from optim.runtime.architecture.table import FAMILIES
from optim.runtime.formats.schemes import Scheme
from optim.runtime.sparsity.side_file import linears_of
from optim.runtime.storage.checkpoint import Checkpoint

PLAIN = 16
BF12 = 12.02  # bits of a bf16 weight that is packed without loss


@dataclass(frozen=True, slots=True)
class Unit:
    """Linears that get one width; `sizes` are the bytes at each scheme, then those of staying."""

    name: str
    linears: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def kind(self) -> str:
        """What it is in every block: `qkv`."""
        return self.name.rpartition(".")[2]


def units_of(
    checkpoint: Checkpoint,
    shapes: Shapes,
    schemes: Sequence[Scheme],
    *,
    apart: bool,
    lossless: bool,
) -> list[Unit]:
    """The units of all blocks; with `lossless` what stays 16 bits is packed in 12."""
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(_unit_of(name, None if apart else checkpoint.family), []).append(name)
    found = []
    for unit, names in groups.items():
        sizes = [sum(packed_bytes(shapes[name], scheme) for name in names) for scheme in schemes]
        plain = sum(_plain(checkpoint, f"{name}.weight", lossless) for name in names)
        found.append(Unit(unit, tuple(names), (*sizes, plain)))
    return found


def rest_bytes(checkpoint: Checkpoint, shapes: Shapes, lossless: bool) -> int:
    """Bytes of what belongs to no unit."""
    return sum(
        _plain(checkpoint, name, lossless and len(info.shape) > 1)
        for name, info in checkpoint.tensors.items()
        if name.removesuffix(".weight") not in shapes
    )


def _unit_of(name: str, family: str | None) -> str:
    """The block and the site of a linear: `model.layers.3.qkv`."""
    parts = name.split(".")
    at = next(k for k, part in enumerate(parts) if part.isdigit()) + 1
    block, inside = ".".join(parts[:at]), ".".join(parts[at:])
    if ".experts." in f".{inside}":
        return f"{block}.experts"
    sites = linears_of(FAMILIES[family].decoder) if family in FAMILIES else {}
    site = next((site for site, members in sites.items() if inside in members), inside)
    return f"{block}.{site}"


def _plain(checkpoint: Checkpoint, name: str, lossless: bool) -> int:
    info = checkpoint.tensors[name]
    packed = lossless and info.dtype == torch.bfloat16
    return round(info.nbytes * BF12 / PLAIN) if packed else info.nbytes
