"""The first pass over a tensor: its hash, its statistics, and whether a layout holds it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from optim.export.lossless.dfloat11 import Counts
from optim.runtime.formats import bf12
from optim.runtime.kernels.cpu_df11 import Array
from optim.runtime.lossless import tensor_hash

MOST_ESCAPES = 0.01  # of a matrix: beyond, bf12 is no gain and it stays bf16


@dataclass(slots=True)
class Survey:
    """`high` counts high bytes, int64 `[256]`; the counts are zero for what is not packed."""

    sha256: str = ""
    counts: Counts = field(default_factory=Counts)
    high: Array = field(default_factory=lambda: np.zeros(256, np.int64))

    def both(self, tensor: Tensor) -> None:
        """Count exponents and high bytes."""
        self.counts.add(tensor)
        bf12.count(tensor, self.high)

    def unfit(self, layout: str) -> str:
        """Why the layout cannot hold the tensor; empty if it can."""
        if layout == "df11":
            return "" if self.counts.fits else "DFloat11 cannot hold 2^113 and more, Inf or NaN"
        escapes = 1 - np.sort(self.high)[-bf12.PALETTE :].sum() / self.high.sum()
        return "" if escapes <= MOST_ESCAPES else f"{escapes:.1%} of its weights are escapes"


def survey(pieces: Iterator[Tensor], layout: str | None) -> Survey:
    """Hash a tensor that comes in pieces, and (None: do not) count what `layout` codes."""
    found = Survey()
    count: dict[str | None, Callable[[Tensor], None]] = {
        None: lambda tensor: None,
        "df11": found.counts.add,
        "bf12": found.both,
    }

    def counted() -> Iterator[Tensor]:
        for tensor in pieces:
            count[layout](tensor)
            yield tensor

    found.sha256 = tensor_hash(counted())
    return found
