"""What a run needs: the bytes of the artifact, of the disk beside it, and of memory."""

import math
from collections.abc import Mapping

from optim.quant.guide import HELD_BACK
from optim.quant.observe import GRAM_BYTES
from optim.quant.solver import Method, Shapes
from optim.recipes.schema import Guided, Recipe
from optim.runtime.formats.bits import words
from optim.runtime.formats.blocks import BLOCKS
from optim.runtime.formats.pack_quantized import Scheme
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.size_table import Stored, stored
from optim.runtime.walk.skeleton import EXPERT_PARTS
from optim.runtime.walk.walk import TOKENS_PER_BATCH, Walk

INNER = EXPERT_PARTS[2]
PROCESS = 500_000_000  # bytes that Python and torch take before anything is loaded


def artifact_rows(
    checkpoint: Checkpoint, shapes: Shapes, schemes: Mapping[str, Scheme]
) -> list[Stored]:
    """Every tensor of the artifact; groups that do not divide are counted as if they did."""
    there = stored(checkpoint, as_read=True)
    rows = [t for t in there if t.name.removesuffix(".weight") not in schemes]
    for module, scheme in schemes.items():
        packed = packed_bytes(shapes[module], scheme)
        rows.append(Stored(f"{module}.weight", str(scheme), math.prod(shapes[module]), packed))
    return rows


def packed_bytes(shape: tuple[int, int], scheme: Scheme) -> int:
    """Bytes of a linear `(out, in)` that is stored so."""
    out, columns = shape
    if scheme.blocks is not None:
        kind = BLOCKS[scheme.blocks]
        return out * math.ceil(columns / kind.size) * kind.nbytes
    size = columns if scheme.group_size == -1 else scheme.group_size
    groups = math.ceil(columns / size)
    packed = 4 * out * words(columns, scheme.bits) + 16 + 2 * out * groups
    return packed if scheme.symmetric else packed + 4 * words(out, scheme.bits) * groups


def state_bytes(method: Method, recipe: Recipe, checkpoint: Checkpoint) -> int:
    """Of the calibration text's hidden states, in float32."""
    if not method.reads_text:
        return 0
    calibration = recipe.calibration
    hidden = int(checkpoint.text_config.get("hidden_size", 0))
    return 4 * calibration.num_samples * calibration.seq_len * hidden


def guide_bytes(recipe: Recipe, state: int, blocks: int, linears: int) -> int:
    """Disk that the reverse walk takes: what every block reads, two gradients, and its results.

    `state` is `state_bytes`, `linears` how many linears the blocks have.
    """
    section = recipe.quantize
    if not isinstance(section, Guided) or not section.guides:
        return 0
    tokens = recipe.calibration.num_samples * recipe.calibration.seq_len
    held = state * blocks // HELD_BACK
    return (blocks + 3) * state + 4 * tokens * section.guide_groups * linears + held


def peak_bytes(
    method: Method, recipe: Recipe, checkpoint: Checkpoint, shapes: Shapes, walk: Walk
) -> int:
    """An estimate: the process, a block as stored, its Gram matrices, the largest linear's work."""
    first = f"{walk.prefix}.0."
    block = sum(i.nbytes for n, i in checkpoint.tensors.items() if n.startswith(first))
    own = {name: shape for name, shape in shapes.items() if name.startswith(first)}
    inside = list(own.values())
    outside = (i for n, i in checkpoint.tensors.items() if not n.startswith(f"{walk.prefix}."))
    outer = max((info.nbytes for info in outside), default=0)
    widest = max((columns for _, columns in inside), default=0)
    work = 2 * block + 4 * max((a * b for a, b in inside), default=0) * 3
    if method.reads_text:
        tokens = recipe.calibration.num_samples * recipe.calibration.seq_len
        section = recipe.quantize
        groups = section.guide_groups if isinstance(section, Guided) and section.guides else None
        work += _gram_bytes(own, groups) + 8 * widest**2 + 4 * TOKENS_PER_BATCH * widest * 4
        work += method.sample_bytes(tokens, widest)
        if groups is not None:
            work = max(work, 2 * block + _reverse_bytes(own))
    return PROCESS + max(work, 2 * outer)


def _reverse_bytes(block: Mapping[str, tuple[int, int]]) -> int:
    """What autograd keeps of a batch: what each linear gives, about three times; experts share."""
    plain = sum(out for name, (out, _) in block.items() if ".experts." not in name)
    expert = max((out for name, (out, _) in block.items() if ".experts." in name), default=0)
    return 3 * 4 * TOKENS_PER_BATCH * (plain + 8 * 3 * expert)


def _gram_bytes(block: Mapping[str, tuple[int, int]], groups: int | None) -> int:
    """Gram matrices held at a time: one a width, one an expert, of inner inputs some at a time;
    guided, one for each of the `groups` of every linear."""
    experts = {name: 4 * shape[1] ** 2 for name, shape in block.items() if ".experts." in name}
    outer = sum(size for name, size in experts.items() if name.endswith(EXPERT_PARTS[1]))
    inner = [size for name, size in experts.items() if name.endswith(INNER)]
    if groups is not None:
        every = sum(4 * columns**2 for _, columns in block.values())
        return groups * (every - sum(inner) + min(sum(inner), GRAM_BYTES))
    widths = {columns for name, (_, columns) in block.items() if name not in experts}
    held = min(sum(inner), GRAM_BYTES + max(inner, default=0))
    return 4 * sum(columns**2 for columns in widths) + max(outer, held)
