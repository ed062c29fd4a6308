"""Where a model's bytes are: one row for each group of tensors that are stored alike.

Only headers are read. The pieces of a packed linear (`weight_packed`, `weight_scale`, ...) count as
one tensor with the linear's own number of weights.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from optim.runtime.formats.pack_quantized import SUFFIXES, SchemeOf
from optim.runtime.formats.static_int import INPUT_PARTS, read_config
from optim.runtime.storage.checkpoint import Checkpoint, schemes_of
from optim.runtime.storage.integers import IntegerStore

BLOCK = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.\d+\.")
NUMBER = re.compile(r"\.\d+(?=\.|$)")
FLOAT_BITS = 12  # weights of fewer bits are not floats
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of the model, however many pieces it is stored in."""

    name: str
    format: str
    params: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class SizeRow:
    """The tensors of one group and format, summed."""

    group: str
    format: str
    tensors: int
    params: int
    nbytes: int


def stored(checkpoint: Checkpoint, *, as_read: bool = False) -> list[Stored]:
    """Every tensor of the model: what it is stored as, its weights and its bytes.

    With `as_read`, of what is stored otherwise (GGUF, lossless), what it is when it is read.
    """
    scheme_of = schemes_of(checkpoint)
    pieces: dict[str, dict[str, str]] = {}
    found = []
    for name, info in checkpoint.tensors.items():
        module, _, suffix = name.rpartition(".")
        if suffix in SUFFIXES or suffix in INPUT_PARTS:
            pieces.setdefault(module, {})[suffix] = name
            continue
        kind = str(info.dtype).removeprefix("torch.")
        held = None if as_read else checkpoint.held(name)
        format_, nbytes = held or (SHORT.get(kind, kind), info.nbytes)
        found.append(Stored(name, format_, math.prod(info.shape), round(nbytes)))
    for module, names in pieces.items():
        blocks = None if as_read else _in_blocks(checkpoint, module, names)
        found.append(blocks or _packed(checkpoint, module, names, scheme_of))
    return found


def _in_blocks(checkpoint: Checkpoint, module: str, names: dict[str, str]) -> Stored | None:
    """A linear that is stored in GGUF's blocks; None if it is not."""
    store, name = checkpoint.store, checkpoint.stored_name(names.get("weight_packed", ""))
    kind = store.blocks(name) if isinstance(store, IntegerStore) and name else None
    if kind is None:
        return None
    outputs, groups = checkpoint.tensors[names["weight_scale"]].shape
    weights = outputs * groups * kind.group
    return Stored(
        f"{module}.weight", kind.name.upper(), weights, weights // kind.size * kind.nbytes
    )


def rounded_before(checkpoint: Checkpoint) -> str | None:
    """Bits and types of weights that were rounded before they came here, as in most GGUF files."""
    rows = stored(checkpoint)
    weights, nbytes = sum(row.params for row in rows), sum(row.nbytes for row in rows)
    kinds = {row.format for row in rows if 8 * row.nbytes <= FLOAT_BITS * row.params}
    if checkpoint.layout is not None or 8 * nbytes > FLOAT_BITS * weights:
        return None
    return f"{8 * nbytes / weights:.1f} bits a weight ({', '.join(sorted(kinds))})"


def size_rows(tensors: Iterable[Stored]) -> list[SizeRow]:
    """The size table: a row for each group and format, the largest first."""
    sums: dict[tuple[str, str], list[int]] = {}
    for tensor in tensors:
        row = sums.setdefault((group_of(tensor.name), tensor.format), [0, 0, 0])
        for column, value in enumerate((1, tensor.params, tensor.nbytes)):
            row[column] += value
    rows = [SizeRow(group, kind, *row) for (group, kind), row in sums.items()]
    return sorted(rows, key=lambda row: -row.nbytes)


def group_of(name: str) -> str:
    """The group of a tensor: norms, biases, a block's part (`mlp.*`), or the module itself."""
    module, _, last = name.rpartition(".")
    if last == "bias":
        return "biases"
    if "norm" in module.rpartition(".")[2] or module.endswith("ln_f"):
        return "norms"
    inside = BLOCK.split(module)[-1]
    if inside == module:
        return module.removeprefix("model.") or name
    parent, dot, _ = NUMBER.sub("", inside).rpartition(".")
    return f"{parent}.*" if dot else inside


def _packed(
    checkpoint: Checkpoint, module: str, names: dict[str, str], scheme_of: SchemeOf
) -> Stored:
    """A packed linear; its number of weights from the shapes of its pieces."""
    infos = {suffix: checkpoint.tensors[name] for suffix, name in names.items()}
    nbytes = sum(info.nbytes for info in infos.values())
    if read_config(checkpoint.quantization) and "weight_packed" in infos:
        outputs, width = infos["weight_packed"].shape
        return Stored(f"{module}.weight", "4-bit static", 2 * outputs * width, nbytes)
    scheme = scheme_of(module)
    if scheme is None or not {"weight_packed", "weight_scale"} <= infos.keys():
        return Stored(f"{module}.weight", "unknown", 0, nbytes)
    outputs, words = infos["weight_packed"].shape
    inputs = words * 32 // scheme.bits
    if scheme.group_size > 0:
        inputs = infos["weight_scale"].shape[1] * scheme.group_size
    return Stored(f"{module}.weight", str(scheme), outputs * inputs, nbytes)
