"""How many weights a token reads, from what was skipped in each block."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from optim.runtime.architecture.table import Decoder as Facts
from optim.runtime.sparsity.side_file import linears_of
from optim.runtime.walk.walk import Walk

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
