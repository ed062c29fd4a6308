"""What of the measured shares is the units' own, and what will be otherwise with other errors.

The errors of all linears meet in the loss: a share is what a linear costs by itself, and what its
error and those of the others happen to do to each other. The second part is as large as the first,
has no sign of its own, and is another one as soon as a width changes; a plan that trusts it picks
the linears that were lucky, and is worse than one width for all. Every width is one more draw of
the errors, so what the widths agree on is the linear's own. Of each kind of unit

    cost of unit u at width b  =  (mean of the kind at b) · (1 + p (x_u - 1))

where x_u is the mean over the widths of u's share relative to its kind, and p how far that mean can
be trusted: with the mean correlation r between k widths it is k r / (1 + (k - 1) r) (Spearman and
Brown).
"""

from collections.abc import Sequence

import numpy as np

LEAST = 0.05  # of its kind's mean: nothing is free


def settled(shares: np.ndarray, kinds: Sequence[str]) -> np.ndarray:
    """Costs float64 `[units, widths]` from the shares that were measured, as the module says."""
    costs = np.zeros_like(shares)
    for kind in dict.fromkeys(kinds):
        own = np.array([name == kind for name in kinds])
        means = shares[own].mean(0).clip(min=1e-9)
        relative = shares[own] / means
        trust = _trust(relative)
        level = (1 + trust * (relative.mean(1) - 1)).clip(min=LEAST)
        costs[own] = level[:, None] * means
    return costs


def _trust(relative: np.ndarray) -> float:
    """How much of the mean of the columns of `[units, widths]` is common to them, from 0 to 1."""
    count = relative.shape[1]
    spread = relative.std(0)
    if count < 2 or not spread.all():
        return 0.0
    between = np.corrcoef(relative.T)
    mean = (between.sum() - count) / (count * (count - 1))
    return float(max(0.0, count * mean / (1 + (count - 1) * mean)))
