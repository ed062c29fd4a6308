"""How many weights a token reads, from what was skipped in each block."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from optim.runtime.architectures import Decoder as Facts
from optim.runtime.core_decoder import CoreDecoder
from optim.runtime.core_ffn import CoreFeedForward
from optim.runtime.decoder import Block, Decoder
from optim.runtime.gated_ffn import GatedFeedForward
from optim.runtime.layers import MLP
from optim.runtime.side import linears_of
from optim.runtime.sparse import SparseLinear
from optim.runtime.walk import Walk

GATE_SHARE = 0.5  # of the site `up`: gate is computed before it is known what can be left out


def read_shares(skipped: Mapping[str, float]) -> dict[str, float]:
    """The share of each site's weights that is read, from the shares of inputs skipped.

    `rows` are rows of up that the gate leaves out; `core` neurons that are not in the fixed set.
    """
    read = {site: 1 - skipped.get(site, 0.0) for site in ("qkv", "out", "up", "down")}
    if "rows" in skipped:
        read["up"] = GATE_SHARE + (1 - GATE_SHARE) * (1 - skipped["rows"])
    if "core" in skipped:
        read["up"] = read["down"] = 1 - skipped["core"]
    return read


def read_share(blocks: Sequence[Mapping[str, Any]], sizes: Mapping[str, int]) -> float:
    """The share of all blocks' weights that a token reads.

    `blocks` are `Skips` as dictionaries, `sizes` the weights of each site of a block.
    """
    shares = [read_shares(block["token"]) for block in blocks]
    read = sum(share[site] * size for share in shares for site, size in sizes.items())
    return read / max(1, len(blocks) * sum(sizes.values()))


def site_sizes(walk: Walk, facts: Facts) -> dict[str, int]:
    """Weights of each site in a block."""
    block = walk.blocks[0]
    return {
        site: sum(math.prod(block.get_parameter(f"{name}.weight").shape) for name in names)
        for site, names in linears_of(facts).items()
    }


def skipped_bytes(decoder: object) -> float:
    """Bytes of weights that a token did not read, on average over the tokens decoded so far."""
    inner = decoder.inner if isinstance(decoder, CoreDecoder) else decoder
    return sum(map(_skipped, inner.blocks)) if isinstance(inner, Decoder) else 0.0


def _skipped(block: Block) -> float:
    mlp = block.mlp
    linears: list[nn.Module] = [block.attention.qkv, block.attention.out]
    saved = 0.0
    if isinstance(mlp, MLP):
        linears += [mlp.up, mlp.down]
    elif isinstance(mlp, GatedFeedForward):
        saved = mlp.skipped_bytes
    elif isinstance(mlp, CoreFeedForward) and mlp.compact is not None and mlp.mode == "sparse":
        saved = _held((mlp.mlp.up, mlp.mlp.down)) - _held((mlp.compact.up, mlp.compact.down))
    return saved + sum(m.skipped_bytes for m in linears if isinstance(m, SparseLinear))


def _held(linears: Iterable[nn.Module]) -> int:
    """Bytes of weights that linears hold, kernels' own layouts included."""
    total = 0
    for linear in linears:
        for module in linear.modules():
            own = getattr(module, "kernel", None) or getattr(module, "columns", None)
            total += own.nbytes if own is not None else _weight(module)
    return total


def _weight(module: nn.Module) -> int:
    weight = getattr(module, "weight", None)
    return 0 if weight is None else int(weight.nbytes)
