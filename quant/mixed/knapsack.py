"""The multiple-choice knapsack, solved exactly for every budget at once.

Each item has some choices, of which one is taken; each has a size and a cost. Partial solutions
that another one beats in both are dropped, item by item (Nemhauser and Ullmann 1969): what is left
at the end is the whole frontier. Sizes of a model's linears are multiples of few numbers, so the
lists stay short.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Frontier:
    """The best of each size: `sizes` int64 rise, `costs` float64 fall."""

    sizes: Array
    costs: Array
    _steps: tuple[tuple[Array, Array], ...]
    """Of each item: the partial solution before it, and the choice that was taken."""

    def choices(self, at: int) -> list[int]:
        """The choice for each item in the solution `at`."""
        found = []
        for before, choice in reversed(self._steps):
            found.append(int(choice[at]))
            at = int(before[at])
        return found[::-1]


def frontier(items: Sequence[tuple[Sequence[int], Sequence[float]]]) -> Frontier:
    """All solutions that no other beats, from the (sizes, costs) of each item's choices."""
    sizes, costs = np.zeros(1, np.int64), np.zeros(1)
    steps = []
    for item_sizes, item_costs in items:
        count = len(sizes)
        all_sizes = np.add.outer(np.asarray(item_sizes, np.int64), sizes).ravel()
        all_costs = np.add.outer(np.asarray(item_costs, np.float64), costs).ravel()
        order = np.lexsort((all_costs, all_sizes))
        least = np.minimum.accumulate(all_costs[order])
        kept = order[np.r_[True, least[1:] < least[:-1]]]
        steps.append((kept % count, kept // count))
        sizes, costs = all_sizes[kept], all_costs[kept]
    return Frontier(sizes, costs, tuple(steps))
