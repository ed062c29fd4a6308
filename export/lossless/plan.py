"""What packing will do to a model: which tensors become units, which shards they go to.

Only headers are looked at. A unit is what DFloat11's own releases make one: the linears of a block
together, an embedding or a head alone. Everything else stays as it is, the small tensors of a
block in that block's file.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from optim.recipes.errors import USAGE, OptimError
from optim.recipes.patterns import matches
from optim.recipes.schema import Pack
from optim.runtime.sparsity.side_file import SIDE
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.lossless.layout import BLOCK
from optim.runtime.storage.lossless.layouts import LAYOUTS
from optim.runtime.storage.lossless.store import LosslessStore
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.storage.tensors import TensorInfo
from optim.runtime.system.file_names import file_stems
from optim.runtime.system.output import check_output

CASTABLE = (torch.float32, torch.float16, torch.float64)
NOT_WEIGHTS = ("weight_scale", "weight_zero_point", "scales", "qzeros", "qweight", "bias")
ORDER = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj")
REST = "rest"  # what belongs to no block; no name that other programs look for
MOST_WEIGHTS = 2**31 - 1  # of a unit: both layouts count in int32


@dataclass(slots=True)
class Shard:
    """One file: units (DFloat11) or matrices (bf12) by name, and what is stored as it is."""

    file: str
    units: dict[str, list[str]] = field(default_factory=dict)
    """Unit -> its tensors, in order."""
    raw: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked packing of one model."""

    checkpoint: Checkpoint
    pack: Pack
    output: Path
    force: bool
    shards: list[Shard]
    source_bytes: int
    packed_weights: int
    raw_bytes: int
    notes: tuple[str, ...]

    @property
    def output_bytes(self) -> int:
        """About what will be written."""
        return (
            int(self.packed_weights * LAYOUTS[self.pack.layout].expected_bits / 8) + self.raw_bytes
        )

    def as_dict(self) -> dict[str, Any]:
        """For the screen and for `--json`."""
        return {
            "model": self.checkpoint.name,
            "layout": self.pack.layout,
            "source_bytes": self.source_bytes,
            "output_bytes": self.output_bytes,
            "packed_weights": self.packed_weights,
            "raw_bytes": self.raw_bytes,
            "shards": [asdict(shard) for shard in self.shards],
            "notes": list(self.notes),
            "output": str(self.output),
        }


def plan(
    source: str | Checkpoint,
    pack: Pack,
    output: str | None = None,
    *,
    force: bool = False,
    trust_remote_code: bool = False,
) -> Plan:
    """Open a model and decide what is packed. OptimError: 2 for the model, 4 for the disk."""
    if isinstance(source, str):
        source = open_checkpoint(source, trust_remote_code=trust_remote_code)
    checkpoint, infos = source, source.store.infos
    _refuse(checkpoint, pack)
    chosen = [name for name, info in infos.items() if _is_weight(name, info, pack)]
    if _is_pruned(checkpoint):  # their rows are skipped one by one
        chosen = [name for name in chosen if not BLOCK.fullmatch(name)]
    wide = [name for name in chosen if infos[name].dtype in CASTABLE]
    if wide and not pack.cast:
        _offer_cast(checkpoint, chosen, wide)
        chosen = [name for name in chosen if name not in wide]
    if not chosen:
        fix = "--cast rounds fp16 and fp32 weights to bf16 first, which is not lossless"
        raise OptimError(f"{checkpoint.source} has no bf16 weights to pack", fix, USAGE)
    place = Path(output or f"./{checkpoint.name}-{pack.layout}")
    weights = sum(math.prod(infos[name].shape) for name in chosen)
    raw = sum(info.nbytes for name, info in infos.items() if name not in chosen)
    made = Plan(
        checkpoint=checkpoint,
        pack=pack,
        output=place,
        force=force,
        shards=_shards(infos, chosen, LAYOUTS[pack.layout].joins),
        source_bytes=sum(info.nbytes for info in infos.values()),
        packed_weights=weights,
        raw_bytes=raw,
        notes=tuple(_notes(checkpoint, wide, pack)),
    )
    check_output(place, force, made.output_bytes, checkpoint.inputs())
    return made


def _refuse(checkpoint: Checkpoint, pack: Pack) -> None:
    """Models that would not be what they were after packing."""
    if _is_pruned(checkpoint) and checkpoint.quantization is None:
        message = f"{checkpoint.source} is pruned: its rows are skipped, and packed ones cannot be"
        raise OptimError(message, "pack the model it was pruned from", USAGE)
    if pack.cast and checkpoint.quantization is not None:
        message = f"{checkpoint.source} is quantized: --cast would round its scales too"
        raise OptimError(message, "`optim pack --cast` the original, then quantize that", USAGE)


def _is_pruned(checkpoint: Checkpoint) -> bool:
    return (checkpoint.folder / SIDE).is_file()


def stored_dtype(info: TensorInfo, pack: Pack) -> torch.dtype:
    """What a tensor is written as: with `cast`, float tensors as bf16."""
    return torch.bfloat16 if pack.cast and info.dtype in CASTABLE else info.dtype


def _is_weight(name: str, info: TensorInfo, pack: Pack) -> bool:
    module, _, last = name.rpartition(".")
    module = module if last == "weight" else name
    size = math.prod(info.shape)
    return (
        len(info.shape) > 1
        and 0 < size <= MOST_WEIGHTS
        and (info.dtype == torch.bfloat16 or info.dtype in CASTABLE)
        and last not in NOT_WEIGHTS
        and any(matches(pattern, module) for pattern in pack.targets)
    )


def _offer_cast(checkpoint: Checkpoint, chosen: Sequence[str], wide: Sequence[str]) -> None:
    """Refuse where most of the weights are no bf16: coding them would save next to nothing."""
    infos = checkpoint.store.infos
    share = sum(infos[n].nbytes for n in wide) / sum(infos[n].nbytes for n in chosen)
    if share <= 0.5:
        return
    kind = str(infos[wide[0]].dtype).removeprefix("torch.")
    raise OptimError(
        f"{checkpoint.source}: {share:.0%} of the weights are {kind}, and both layouts hold bf16",
        "--cast rounds them to bf16 first; that step is not lossless, the packing after it is",
        USAGE,
    )


def _notes(checkpoint: Checkpoint, wide: Sequence[str], pack: Pack) -> list[str]:
    notes = []
    if pack.cast and wide:
        notes.append(f"{len(wide)} tensors are rounded to bf16 first: that is not lossless")
    elif wide:
        notes.append(f"{len(wide)} tensors of other types stay as they are")
    if isinstance(checkpoint.store, LosslessStore):
        notes.append("the model is packed already; it is packed anew")
    return notes


def _shards(infos: dict[str, TensorInfo], chosen: Sequence[str], joins: bool) -> list[Shard]:
    """A file for each block, for each large tensor outside, and one for the rest."""
    shards: dict[str, Shard] = {}
    for name in [*sorted(chosen, key=_rank), *(n for n in infos if n not in set(chosen))]:
        match = BLOCK.fullmatch(name)
        block = match[1] if match else None
        packed = name in chosen
        own = block or (name.removesuffix(".weight") if packed else REST)
        shard = shards.setdefault(own, Shard(""))
        if not packed:
            shard.raw.append(name)
            continue
        whole = joins and block is not None and name.endswith(".weight")
        size = sum(math.prod(infos[n].shape) for n in shard.units.get(own, []))
        whole = whole and size + math.prod(infos[name].shape) <= MOST_WEIGHTS
        alone = name.removesuffix(".weight") if joins else name
        shard.units.setdefault(own if whole else alone, []).append(name)
    for own, stem in file_stems(shards).items():
        shards[own].file = f"{stem}.safetensors"
    return sorted(shards.values(), key=lambda shard: _natural(shard.file))


def _rank(name: str) -> tuple[Any, ...]:
    """The published order inside a unit, blocks by number."""
    match = BLOCK.fullmatch(name)
    inside = match[2] if match else name
    part = inside.removesuffix(".weight").rpartition(".")[2]
    attention = 0 if "attn" in inside or "attention" in inside else 1
    place = ORDER.index(part) if part in ORDER else len(ORDER)
    return _natural(match[1] if match else name), attention, place, _natural(inside)


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """A key that sorts block 10 after block 9."""
    return tuple((int(t), "") if t.isdigit() else (-1, t) for t in re.split(r"(\d+)", name))
