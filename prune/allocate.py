"""Where to be sparse: a budget shared out so that the sum of the measured losses is least.

Each place (a site of a block, or a block) has a size and, at every level of a common grid, a loss
measured with that place alone at that level. Losses are taken to add up. Levels are raised one
place at a time, always where a unit of size costs least, until the budget is met.
"""

from collections.abc import Mapping
from heapq import heapify, heappop, heappush
from itertools import pairwise


def allocate(
    losses: Mapping[str, list[float]],
    sizes: Mapping[str, float],
    levels: list[float],
    target: float,
) -> dict[str, float]:
    """The level of each place, so that the size-weighted mean is `target`.

    `losses[place][k]` is the loss at `levels[k]`; levels ascend from 0, whose loss is 0. The last
    raise is cut to meet the target. Raises ValueError if no levels reach it.
    """
    curves = {place: convex(levels, loss) for place, loss in losses.items()}
    left = target * sum(sizes[place] for place in losses)
    found = dict.fromkeys(losses, 0.0)
    queue = [(slope / sizes[p], p, 1) for p, c in curves.items() for slope in c[1][:1]]
    heapify(queue)
    while left > 1e-9:
        if not queue:
            raise ValueError(f"the levels do not reach {target:.0%}")
        _, place, k = heappop(queue)
        points, slopes = curves[place]
        step = min(points[k] - points[k - 1], left / sizes[place])
        found[place] = points[k - 1] + step
        left -= step * sizes[place]
        if k < len(slopes):
            heappush(queue, (slopes[k] / sizes[place], place, k + 1))
    return found


def convex(levels: list[float], losses: list[float]) -> tuple[list[float], list[float]]:
    """The lower convex hull of a loss curve: its levels, and the slopes between them."""
    hull: list[tuple[float, float]] = []
    for point in zip(levels, losses, strict=True):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    slopes = [_slope(a, b) for a, b in pairwise(hull)]
    return [level for level, _ in hull], slopes


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
